"""What the objectives share: how trajectories are pooled, the anchor, and checks of what enters a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.scan import subtree_sum, tree_cumsum
from fastgfn.ops.subtb import subtb_tree_pairs
from fastgfn.types import LogProbs, TokenTree

NORMALIZATIONS = ("group", "batch", "trajectory")


@dataclass(frozen=True, slots=True)
class Objective:
    """loss: () differentiable. log_z: (G,) detached group means of log R(x) - log q(x) over the batch."""

    loss: Tensor
    log_z: Tensor


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
    check_options(name, subtb_lambda, normalization)
    ends = window_ends(tree)
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
    check_normalization(name, normalization)
    share = _shares(name, tree, weights)
    if normalization != "group":
        return share / max(1, len(share))
    group = tree.group[tree.leaf].long()
    size = torch.bincount(group, minlength=tree.num_groups)
    return share / size[group] / (size > 0).sum()


@torch.no_grad()
def log_ratio(log_probs: LogProbs, tree: TokenTree, log_reward: Tensor) -> Tensor:
    """(N,) log R(x) - log q(x) of every trajectory: log Z(X) at the solution."""
    return -log_excess(log_probs, tree, log_reward)


def log_excess(log_probs: LogProbs, tree: TokenTree, log_reward: Tensor) -> Tensor:
    """(N,) log q(x) - log R(x) of every trajectory, float64: a difference of large numbers."""
    log_q = tree_cumsum(log_probs.log_pf.double(), tree.parent) + log_probs.log_pterm
    return (log_q - log_reward)[tree.leaf]


def group_mean(values: Tensor, tree: TokenTree) -> Tensor:
    """(G,) mean of values (N,) over each prompt's trajectories, 0 without any."""
    group = tree.group[tree.leaf].long()
    sums = torch.zeros(tree.num_groups, dtype=values.dtype, device=values.device).index_add(0, group, values)
    return sums / torch.bincount(group, minlength=tree.num_groups).clamp(min=1)


def check_options(name: str, subtb_lambda: float, normalization: str) -> None:
    checks.check(
        0.0 <= subtb_lambda <= 1.0, name, "subtb_lambda", "in [0, 1]", subtb_lambda, "1.0 is the paper's"
    )
    check_normalization(name, normalization)


def check_normalization(name: str, normalization: str) -> None:
    checks.check(
        normalization in NORMALIZATIONS,
        name,
        "normalization",
        f"one of {NORMALIZATIONS}",
        normalization,
        "use 'group'",
    )


def check_inputs(
    name: str, tree: TokenTree, log_reward: Tensor, coefficients: Tensor, weights: Tensor | None
) -> None:
    fix = "pass them to the function that made the coefficients"
    checks.check(weights is None, name, "weights", "None beside coefficients", "a tensor", fix)
    want = tuple(tree.leaf.shape)
    checks.check_shape(name, "coefficients", coefficients, want, "pass one per trajectory")
    want = (tree.num_nodes,)
    checks.check_shape(name, "log_reward", log_reward, want, "pass the result of log_reward(tree)")


def check_log_z(name: str, tree: TokenTree, log_z: Tensor) -> None:
    checks.check_shape(name, "log_z", log_z, (tree.num_groups,), "one value per prompt")


def _shares(name: str, tree: TokenTree, weights: Tensor | None) -> Tensor:
    """(N,) float64 weights of the trajectories, 1 without any."""
    num = tree.leaf.shape[0]
    ones = torch.ones(num, dtype=torch.float64, device=tree.leaf.device)
    share = ones if weights is None else weights.double()
    checks.check_shape(name, "weights", share, (num,), "one weight per trajectory")
    return share


def window_ends(tree: TokenTree) -> Tensor:
    """(T,) bool: the states that windows begin and end at."""
    return tree.terminable | tree.is_root_state if has_anchor(tree) else tree.terminable


def through(tree: TokenTree, share: Tensor) -> Tensor:
    """(T,) sum of `share` (N,) over the trajectories that pass through each node."""
    at_leaf = torch.zeros(tree.num_nodes, dtype=share.dtype, device=share.device)
    return subtree_sum(at_leaf.index_add(0, tree.leaf, share), tree.parent)


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.ones_like(total))
