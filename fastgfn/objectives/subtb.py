"""Balance of every prefix of a trajectory with every other, on the nodes of the tree.

Modified sub-trajectory balance (Hu et al. 2024, arXiv:2310.04363; Madan et al. 2023, arXiv:2209.12782). With
    U(s) = log q(s) + log q(stop | s) - log R(s stop)
for every terminable prefix s, the loss is the weighted mean of (U(s_j) - U(s_i))^2 over the windows i < j of
every trajectory. What differs from the published code:
1. It is computed on the token tree: windows that several trajectories share are computed once and counted.
2. Prefixes that cannot stop end no window; if s_0 is one, U(s_0) = -log Z(X) takes its place (the anchor).
3. Windows are pooled per prompt by default, then averaged over prompts, which is what the published gradient
   accumulation over one-prompt batches amounts to.

The objectives with explicit flows take every state, U(s) = log q(s) - log F(s) with a learned log F, and one
more at the end of a trajectory, U(x) = log q(x) - log R(x), so that they read log R of whole sequences alone.
Where stopping is certain the end alone stands for both, but at s_0: F(s) = R(x) leaves nothing to learn.
"""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.objectives.pooling import (
    Objective,
    Pooling,
    Residual,
    check_inputs,
    group_mean,
    known_log_z,
    log_ratio,
)
from fastgfn.objectives.windows import coefficients_of, flow_states, has_anchor, stop_states, window_sum
from fastgfn.phases import phase
from fastgfn.types import LogProbs, TokenTree


@phase("loss")
def modified_subtb_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,)
    coefficients: Tensor | None = None,  # (N,)
    include_sink: bool = False,
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """Modified SubTB(lambda) on a token tree, O(T); zero exactly when q is proportional to R.

    loss = sum over windows of c lambda^(k-1) (U_j - U_i)^2 / sum over windows of c lambda^(k-1), where k
    counts the terminable states in (i, j] and c the trajectories that contain the window. Choose it where
    every prefix has an informative reward, such as a language model's; where that is only known at the end,
    its windows pull at the stop of every prefix: take `vargrad_loss`.
    Hu et al. 2024 (arXiv:2310.04363), with the differences at the head of this file.

    Args:
        log_probs: node-aligned, from `score`.
        log_reward: (T,) log R / T_reward at terminable nodes, already tempered.
        subtb_lambda: in [0, 1]; 1 weighs all windows alike, 0 keeps single transitions (detailed balance).
        normalization: pools the ratio over each prompt ("group", then averaged over prompts), over the whole
            "batch", or within each "trajectory" (then averaged).
        weights: importance weights of the trajectories; numerator only, no gradient.
        log_z: log Z(X) for the anchor where s_0 cannot stop; a learned value receives its gradient. None
            uses the detached group mean of log R(x) - log q(x).
        coefficients: of these trajectories, from `window_coefficients` of the whole tree that this one is a
            part of; normalization and weights went into them. The losses of all parts add up to the whole's
            if log_z is also that of the whole wherever the anchor is in use.
        include_sink: the second mask convention of the published code: the state after the stop is one more,
            with the potential of the last. A window to it weighs lambda times that to the last state.
        residual_loss, residual_limit: the cost of U_j - U_i, see fastgfn.ops.residual; "clamped" gives
            windows of a residual beyond the limit no gradient. O(N L^2) but for squares.

    Raises:
        InputError: a shape disagrees, lambda is outside [0, 1], an unknown normalization or residual loss,
            weights beside coefficients.
    """
    name = "modified_subtb_loss"
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    check_inputs(name, tree, pooling, residual, log_reward=log_reward)
    states = stop_states(tree, include_sink=include_sink)
    coefficients = coefficients_of(name, tree, states, subtb_lambda, pooling)
    log_flow, ratio = stop_flows(name, log_probs, tree, log_reward, log_z)
    log_pf = states.of(log_probs.log_pf, torch.zeros_like(log_flow))
    loss = window_sum(tree, states, log_pf, states.of(log_flow), coefficients, subtb_lambda, residual)
    return Objective(loss, group_mean(ratio, tree).to(loss.dtype), ratio)


def modified_detailed_balance_loss(log_probs: LogProbs, *, tree: TokenTree, **options) -> Objective:
    """Modified detailed balance: `modified_subtb_loss` with subtb_lambda = 0, the transitions between
    neighbouring terminable prefixes alone; zero exactly when q is proportional to R.

    loss = mean over transitions of (log q(z_k | s_k-1) + log q(stop | s_k) - log q(stop | s_k-1)
    + log R(s_k-1 stop) - log R(s_k stop))^2. Choose it where windows over long sequences are too noisy; what
    a late reward says travels one token a time. Deleu et al. 2022 (arXiv:2202.13903); here neighbours may lie
    several tokens apart, where those between cannot stop.

    Args and raises: as `modified_subtb_loss`, whose coefficients are for subtb_lambda = 0 here.
    """
    return modified_subtb_loss(log_probs, tree=tree, subtb_lambda=0.0, **options)


@phase("loss")
def subtb_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_flow: Tensor | None = None,  # (T,)
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """SubTB(lambda) with explicit flows on a token tree, O(T); zero where q is proportional to R and F(s) is
    the R-mass of the sequences that begin with s.

    With U_k = log q(s_k) - log F(s_k) of the states s_0..s_n of a trajectory, terminable or not (s_n > s_0
    only if stopping there is not certain), and U_{n+1} = log q(x) - log R(x) at its end, the loss is that of
    `modified_subtb_loss` with these states, without an anchor: log F(s_0) is log Z(X). Choose it where
    prefixes have no reward and credit over long sequences is the difficulty; log F has to be learned.
    Madan et al. 2023 (arXiv:2209.12782); here windows are pooled per prompt by default.

    Args:
        log_reward: (T,) tempered; read only where a trajectory stops.
        log_flow: (T,) log F at the states, with gradient; None is log_probs.log_flow, of the policy's head.
        coefficients: from `flow_coefficients` of the whole tree, as of `modified_subtb_loss`.
        The others, raises: as `modified_subtb_loss`; InputError without flows.
    """
    name = "subtb_loss"
    log_flow = log_probs.log_flow if log_flow is None else log_flow
    fix = "give the policy a flow_head (log_z='head')"
    checks.check(log_flow is not None, name, "log_flow", "given", None, fix)
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    check_inputs(name, tree, pooling, residual, log_reward=log_reward, log_flow=log_flow)
    states = flow_states(tree)
    coefficients = coefficients_of(name, tree, states, subtb_lambda, pooling)
    log_pf = states.of(log_probs.log_pf, log_probs.log_pterm)
    flows = states.of(log_flow.to(log_pf.dtype), log_reward.detach().to(log_pf.dtype))
    loss = window_sum(tree, states, log_pf, flows, coefficients, subtb_lambda, residual)
    ratio = log_ratio(log_probs, tree, log_reward)
    return Objective(loss, group_mean(ratio, tree).to(loss.dtype), ratio)


def detailed_balance_loss(log_probs: LogProbs, *, tree: TokenTree, **options) -> Objective:
    """Detailed balance with explicit flows: `subtb_loss` with subtb_lambda = 0, each transition alone.

    loss = mean over transitions of (log F(s_k) + log q(s_k+1 | s_k) - log F(s_k+1))^2, the last one with
    q(stop | s_n) and log R(x). Choose it, over `subtb_loss`, where windows are too noisy: what the end says
    travels one token a time. Bengio et al. 2023 (arXiv:2111.09266); here pooled per prompt.

    Args, fixed point and raises: as `subtb_loss`, whose coefficients are for subtb_lambda = 0 here.
    """
    return subtb_loss(log_probs, tree=tree, subtb_lambda=0.0, **options)


def stop_flows(
    name: str, log_probs: LogProbs, tree: TokenTree, log_reward: Tensor, log_z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(T,) log F(s) = log R(s stop) - log q(stop | s), log Z(X) where s_0 cannot stop, and the (N,) ratios
    log R(x) - log q(x) whose mean log Z(X) is if it is not known."""
    log_reward = log_reward.to(log_probs.log_pf.dtype)
    ratio = log_ratio(log_probs, tree, log_reward)
    log_flow = log_reward - log_probs.log_pterm
    if has_anchor(tree):
        value = known_log_z(name, tree, log_z, group_mean(ratio, tree))
        anchor = tree.is_root_state & ~tree.terminable
        log_flow = torch.where(anchor, value[tree.group.long()].to(log_flow), log_flow)
    return log_flow, ratio
