"""Balance of every prefix of a trajectory with every other, on the nodes of the tree.

Modified sub-trajectory balance (Hu et al. 2024, arXiv:2310.04363; Madan et al. 2023, arXiv:2209.12782). With
    U(s) = log q(s) + log q(stop | s) - log R(s stop)
for every terminable prefix s, the loss is the weighted mean of (U(s_j) - U(s_i))^2 over the windows i < j of
every trajectory. What differs from the published code:
1. It is computed on the token tree: windows that several trajectories share are computed once and counted.
2. Prefixes that cannot stop end no window; if s_0 is one, U(s_0) = -log Z(X) takes its place (the anchor).
3. Windows are pooled per prompt by default, then averaged over prompts, which is what the published gradient
   accumulation over one-prompt batches amounts to.
"""

import torch
from torch import Tensor

from fastgfn.objectives.pooling import (
    Objective,
    check_inputs,
    check_log_z,
    check_options,
    group_mean,
    has_anchor,
    log_ratio,
    through,
    window_coefficients,
    window_ends,
)
from fastgfn.ops.subtb import subtb_tree
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
) -> Objective:
    """Modified SubTB(lambda) on a token tree, O(T); zero exactly when q is proportional to R.

    loss = sum over windows of c lambda^(k-1) (U_j - U_i)^2 / sum over windows of c lambda^(k-1), where k
    counts the terminable states in (i, j] and c the trajectories that contain the window.

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

    Raises:
        InputError: a shape disagrees, lambda is outside [0, 1], an unknown normalization, weights beside
            coefficients.
    """
    name = "modified_subtb_loss"
    check_options(name, subtb_lambda, normalization)
    if coefficients is None:
        coefficients = window_coefficients(
            tree, subtb_lambda=subtb_lambda, normalization=normalization, weights=weights
        )
        weights = None
    check_inputs(name, tree, log_reward, coefficients, weights)
    log_reward = log_reward.to(log_probs.log_pf.dtype)
    estimate = group_mean(log_ratio(log_probs, tree, log_reward), tree).to(log_reward)
    log_flow = log_reward - log_probs.log_pterm
    if has_anchor(tree):
        root_value = estimate if log_z is None else log_z
        check_log_z(name, tree, root_value)
        anchor = tree.is_root_state & ~tree.terminable
        log_flow = torch.where(anchor, root_value[tree.group.long()].to(log_flow), log_flow)
    valid, weight = window_ends(tree), through(tree, coefficients)
    loss = subtb_tree(log_probs.log_pf, log_flow, tree.parent, valid, weight.to(log_flow), subtb_lambda)
    return Objective(loss=loss, log_z=estimate)
