"""Stage 4: LogProbs and log R -> loss, on the nodes of the tree.

1. `modified_subtb_loss`: balance of every prefix of a trajectory with every other.
2. `vargrad_loss`: balance of whole trajectories of a prompt with each other, for rewards of whole ones.

Modified sub-trajectory balance (Hu et al. 2024, arXiv:2310.04363; Madan et al. 2023, arXiv:2209.12782). With
    U(s) = log q(s) + log q(stop | s) - log R(s stop)
for every terminable prefix s, the loss is the weighted mean of (U(s_j) - U(s_i))^2 over the windows i < j of
every trajectory. What differs from the published code:
1. It is computed on the token tree: windows that several trajectories share are computed once and counted.
2. Prefixes that cannot stop end no window; if s_0 is one, U(s_0) = -log Z(X) takes its place (the anchor).
3. Windows are pooled per prompt by default, then averaged over prompts, which is what the published gradient
   accumulation over one-prompt batches amounts to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.scan import subtree_sum, tree_cumsum
from fastgfn.ops.subtb import subtb_tree, subtb_tree_pairs
from fastgfn.phases import phase
from fastgfn.types import LogProbs, TokenTree

NORMALIZATIONS = ("group", "batch", "trajectory")


@dataclass(frozen=True, slots=True)
class Objective:
    """loss: () differentiable. log_z: (G,) detached group means of log R(x) - log q(x) over the batch."""

    loss: Tensor
    log_z: Tensor


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
    _check_options(name, subtb_lambda, normalization)
    if coefficients is None:
        coefficients = window_coefficients(
            tree, subtb_lambda=subtb_lambda, normalization=normalization, weights=weights
        )
        weights = None
    _check_inputs(name, tree, log_reward, coefficients, weights)
    log_reward = log_reward.to(log_probs.log_pf.dtype)
    estimate = group_mean(log_ratio(log_probs, tree, log_reward), tree).to(log_reward)
    log_flow = log_reward - log_probs.log_pterm
    if has_anchor(tree):
        root_value = estimate if log_z is None else log_z
        _check_log_z(name, tree, root_value)
        anchor = tree.is_root_state & ~tree.terminable
        log_flow = torch.where(anchor, root_value[tree.group.long()].to(log_flow), log_flow)
    valid, weight = _window_ends(tree), _through(tree, coefficients)
    loss = subtb_tree(log_probs.log_pf, log_flow, tree.parent, valid, weight.to(log_flow), subtb_lambda)
    return Objective(loss=loss, log_z=estimate)


@phase("loss")
def vargrad_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,)
    coefficients: Tensor | None = None,  # (N,)
) -> Objective:
    """VarGrad on a token tree: the variance of log q(x) - log R(x) over each prompt's trajectories, O(T);
    zero exactly when q is proportional to R on what was drawn.

    With delta = log q(x) - log R(x), every action and the final stop in it, and m the mean of delta over the
    n trajectories of the prompt, under this policy and detached,
        loss = mean over prompts of 1/n sum over trajectories of (delta - m)^2.
    Deviations from a mean add up to 0, so that m needs no gradient: this one is exactly that of the variance,
    and n / (n - 1) times it that of its unbiased estimate. Minus m estimates log Z(X), which nobody has to
    learn. A prompt with a single trajectory adds nothing.

    Richter et al. 2020 (arXiv:2010.10436), Zhang et al. 2023 (arXiv:2302.05446).

    Args:
        log_probs: node-aligned, from `score`.
        log_reward: (T,) log R / T_reward, already tempered; read only where a trajectory stops.
        normalization: a mean per prompt, then over prompts ("group"); "batch" and "trajectory" are the mean
            over all trajectories.
        weights: importance weights of the trajectories; numerator only, no gradient, not in m.
        log_z: -m of every prompt where it is known better than from this tree; a learned value receives its
            gradient (trajectory balance).
        coefficients: of these trajectories, from `trajectory_coefficients` of the whole tree that this one is
            a part of. The losses of all parts add up to the whole's if log_z is also that of the whole
            wherever parts share a prompt.

    Raises:
        InputError: a shape disagrees, an unknown normalization, weights beside coefficients.
    """
    name = "vargrad_loss"
    _check_normalization(name, normalization)
    if coefficients is None:
        coefficients = trajectory_coefficients(tree, normalization=normalization, weights=weights)
        weights = None
    _check_inputs(name, tree, log_reward, coefficients, weights)
    delta = _delta(log_probs, tree, log_reward.detach())
    estimate = group_mean(-delta.detach(), tree)
    log_z = estimate if log_z is None else log_z
    _check_log_z(name, tree, log_z)
    residual = delta + log_z.to(delta)[tree.group[tree.leaf].long()]
    loss = (coefficients.to(delta) * residual.square()).sum()
    return Objective(loss=loss.to(log_probs.log_pf.dtype), log_z=estimate.to(log_probs.log_pf.dtype))


def has_anchor(tree: TokenTree) -> bool:
    """Whether s_0 cannot stop, so that the loss reads log Z(X), by default a mean over a prompt's samples.

    It is the same for every prompt. Under a grammar it is read from the tree, which waits for a GPU.
    """
    if tree.allowed is not None:
        return bool((tree.is_root_state & ~tree.terminable).any())
    return tree.constraints.termination == "forced" and tree.constraints.min_length > 0


def window_coefficients(
    tree: TokenTree,
    *,
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """(N,) float64 coefficients a with which `modified_subtb_loss` is the sum over trajectories n and windows
    of n of a_n lambda^(k-1) (U_j - U_i)^2.

    They depend on the tree's structure alone, so they are known before any of it is scored.

    Args and raises: as `modified_subtb_loss`.
    """
    name = "window_coefficients"
    _check_options(name, subtb_lambda, normalization)
    ends = _window_ends(tree)
    pairs = subtb_tree_pairs(tree.parent, ends, subtb_lambda) * ends
    share = _shares(name, tree, weights)
    if normalization == "trajectory":
        total = tree_cumsum(pairs, tree.parent)[tree.leaf]
        used = total > 0
        return share * used / torch.where(used, total, torch.ones_like(total)) / used.sum().clamp(min=1)
    mass = tree.count * pairs
    if normalization == "batch":
        return share / _nonzero(mass.sum())
    zeros = torch.zeros(tree.num_groups, dtype=torch.float64, device=pairs.device)
    per_group = zeros.index_add(0, tree.group.long(), mass)
    scale = (per_group > 0) / _nonzero(per_group) / (per_group > 0).sum().clamp(min=1)
    return share * scale[tree.group[tree.leaf].long()]


def trajectory_coefficients(
    tree: TokenTree,
    *,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """(N,) float64 coefficients a with which `vargrad_loss` is the sum over trajectories n of
    a_n (delta_n - m)^2.

    Args and raises: as `vargrad_loss`.
    """
    name = "trajectory_coefficients"
    _check_normalization(name, normalization)
    share = _shares(name, tree, weights)
    if normalization != "group":
        return share / max(1, len(share))
    group = tree.group[tree.leaf].long()
    size = torch.bincount(group, minlength=tree.num_groups)
    return share / size[group] / (size > 0).sum()


@torch.no_grad()
def log_ratio(log_probs: LogProbs, tree: TokenTree, log_reward: Tensor) -> Tensor:
    """(N,) log R(x) - log q(x) of every trajectory: log Z(X) at the solution."""
    return -_delta(log_probs, tree, log_reward)


def _delta(log_probs: LogProbs, tree: TokenTree, log_reward: Tensor) -> Tensor:
    """(N,) log q(x) - log R(x) of every trajectory, float64: a difference of large numbers."""
    log_q = tree_cumsum(log_probs.log_pf.double(), tree.parent) + log_probs.log_pterm
    return (log_q - log_reward)[tree.leaf]


def group_mean(values: Tensor, tree: TokenTree) -> Tensor:
    """(G,) mean of values (N,) over each prompt's trajectories, 0 without any."""
    group = tree.group[tree.leaf].long()
    sums = torch.zeros(tree.num_groups, dtype=values.dtype, device=values.device).index_add(0, group, values)
    return sums / torch.bincount(group, minlength=tree.num_groups).clamp(min=1)


def _check_options(name: str, subtb_lambda: float, normalization: str) -> None:
    checks.check(
        0.0 <= subtb_lambda <= 1.0, name, "subtb_lambda", "in [0, 1]", subtb_lambda, "1.0 is the paper's"
    )
    _check_normalization(name, normalization)


def _check_normalization(name: str, normalization: str) -> None:
    checks.check(
        normalization in NORMALIZATIONS,
        name,
        "normalization",
        f"one of {NORMALIZATIONS}",
        normalization,
        "use 'group'",
    )


def _check_inputs(
    name: str, tree: TokenTree, log_reward: Tensor, coefficients: Tensor, weights: Tensor | None
) -> None:
    fix = "pass them to the function that made the coefficients"
    checks.check(weights is None, name, "weights", "None beside coefficients", "a tensor", fix)
    want = tuple(tree.leaf.shape)
    checks.check_shape(name, "coefficients", coefficients, want, "pass one per trajectory")
    want = (tree.num_nodes,)
    checks.check_shape(name, "log_reward", log_reward, want, "pass the result of log_reward(tree)")


def _check_log_z(name: str, tree: TokenTree, log_z: Tensor) -> None:
    checks.check_shape(name, "log_z", log_z, (tree.num_groups,), "one value per prompt")


def _shares(name: str, tree: TokenTree, weights: Tensor | None) -> Tensor:
    """(N,) float64 weights of the trajectories, 1 without any."""
    num = tree.leaf.shape[0]
    ones = torch.ones(num, dtype=torch.float64, device=tree.leaf.device)
    share = ones if weights is None else weights.double()
    checks.check_shape(name, "weights", share, (num,), "one weight per trajectory")
    return share


def _window_ends(tree: TokenTree) -> Tensor:
    """(T,) bool: the states that windows begin and end at."""
    return tree.terminable | tree.is_root_state if has_anchor(tree) else tree.terminable


def _through(tree: TokenTree, share: Tensor) -> Tensor:
    """(T,) sum of `share` (N,) over the trajectories that pass through each node."""
    at_leaf = torch.zeros(tree.num_nodes, dtype=share.dtype, device=share.device)
    return subtree_sum(at_leaf.index_add(0, tree.leaf, share), tree.parent)


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.ones_like(total))
