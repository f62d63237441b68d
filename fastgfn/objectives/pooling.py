"""What the objectives share: how trajectories are pooled, what a residual costs, and checks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops import residual as ops
from fastgfn.ops.scan import tree_cumsum
from fastgfn.types import LogProbs, TokenTree

NORMALIZATIONS = ("group", "batch", "trajectory")


@dataclass(frozen=True, slots=True)
class Objective:
    """loss: () differentiable.
    log_z: (G,) detached group means of log_ratio over the batch.
    log_ratio: (N,) detached, what every trajectory alone says that log Z(X) is: log R(x) - log q(x), or what
        an objective of another target takes for it.
    """

    loss: Tensor
    log_z: Tensor
    log_ratio: Tensor


class Pooling(NamedTuple):
    """How the trajectories of a loss are pooled, or the coefficients that this went into."""

    normalization: str = "group"
    weights: Tensor | None = None
    coefficients: Tensor | None = None


class Residual(NamedTuple):
    """What a residual costs, see fastgfn.ops.residual; limit of "clamped"."""

    loss: str = "squared"
    limit: float | None = None

    def __call__(self, value: Tensor) -> Tensor:
        return ops.residual_loss(value, self.loss, self.limit)


def trajectory_coefficients(
    tree: TokenTree,
    *,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """(N,) float64 coefficients a with which an objective of whole trajectories is the sum over them, n, of
    a_n phi(residual_n).

    Args and raises: as `vargrad_loss`.
    """
    name = "trajectory_coefficients"
    check_normalization(name, normalization)
    return pooled(name, tree, torch.ones_like(tree.leaf, dtype=torch.float64), normalization, weights)


def pooled(name: str, tree: TokenTree, mass: Tensor, normalization: str, weights: Tensor | None) -> Tensor:
    """(N,) float64 factors of the numerators of trajectories whose denominators are `mass` (N,)."""
    share = _shares(name, tree, weights)
    if normalization == "trajectory":
        return share * (mass > 0) / _nonzero(mass) / (mass > 0).sum().clamp(min=1)
    if normalization == "batch":
        return share / _nonzero(mass.sum())
    per_group = group_sum(mass, tree)
    scale = (per_group > 0) / _nonzero(per_group) / (per_group > 0).sum().clamp(min=1)
    return share * scale[tree.group[tree.leaf].long()]


def log_q(log_probs: LogProbs, tree: TokenTree) -> Tensor:
    """(N,) log q(x) of every trajectory, the stop included, float64."""
    return (tree_cumsum(log_probs.log_pf.double(), tree.parent) + log_probs.log_pterm)[tree.leaf]


@torch.no_grad()
def log_ratio(log_probs: LogProbs, tree: TokenTree, log_reward: Tensor) -> Tensor:
    """(N,) float64 log R(x) - log q(x) of every trajectory: log Z(X) at the solution."""
    return log_reward[tree.leaf] - log_q(log_probs, tree)


def group_sum(values: Tensor, tree: TokenTree) -> Tensor:
    """(G,) sum of values (N,) over each prompt's trajectories."""
    zeros = torch.zeros(tree.num_groups, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, tree.group[tree.leaf].long(), values)


def group_mean(values: Tensor, tree: TokenTree) -> Tensor:
    """(G,) mean of values (N,) over each prompt's trajectories, 0 without any."""
    size = torch.bincount(tree.group[tree.leaf].long(), minlength=tree.num_groups)
    return group_sum(values, tree) / size.clamp(min=1)


def check_normalization(name: str, normalization: str) -> None:
    ok, want = normalization in NORMALIZATIONS, f"one of {NORMALIZATIONS}"
    checks.check(ok, name, "normalization", want, normalization, "use 'group'")


def check_inputs(name: str, tree: TokenTree, pooling: Pooling, residual: Residual, **nodes: Tensor) -> None:
    """nodes: values of the tree's nodes, by name."""
    if pooling.coefficients is not None:
        fix = "pass them to the function that made the coefficients"
        ok = pooling.weights is None
        checks.check(ok, name, "weights", "None beside coefficients", "a tensor", fix)
        want = tuple(tree.leaf.shape)
        checks.check_shape(name, "coefficients", pooling.coefficients, want, "pass one per trajectory")
    ok, want = residual.loss in ops.LOSSES, f"one of {ops.LOSSES}"
    checks.check(ok, name, "residual_loss", want, repr(residual.loss), "use 'squared'")
    if residual.limit is not None:
        ok, fix = residual.loss == "clamped", "it goes with residual_loss='clamped'"
        checks.check(ok, name, "residual_limit", "None", residual.limit, fix)
        checks.check(residual.limit > 0, name, "residual_limit", "> 0", residual.limit, "raise it")
    for arg, value in nodes.items():
        checks.check_shape(name, arg, value, (tree.num_nodes,), f"pass the result of {arg}(tree)")


def known_log_z(name: str, tree: TokenTree, log_z: Tensor | None, estimate: Tensor) -> Tensor:
    """(G,) log_z, or the estimate where it is None; () stands for every prompt."""
    if log_z is None:
        return estimate
    log_z = log_z.expand(tree.num_groups) if log_z.dim() == 0 else log_z
    checks.check_shape(name, "log_z", log_z, (tree.num_groups,), "one value per prompt")
    return log_z


def _shares(name: str, tree: TokenTree, weights: Tensor | None) -> Tensor:
    """(N,) float64 weights of the trajectories, 1 without any."""
    num = tree.leaf.shape[0]
    ones = torch.ones(num, dtype=torch.float64, device=tree.leaf.device)
    share = ones if weights is None else weights.detach().to(ones)
    checks.check_shape(name, "weights", share, (num,), "one weight per trajectory")
    return share


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.ones_like(total))
