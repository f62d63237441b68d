"""Importance weights of trajectories that another policy drew."""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import values

NAME = "importance_weights"


def importance_weights(
    log_q: Tensor,  # (N,) floating point
    log_behavior: Tensor,  # (N,) floating point
    *,
    clip: float | tuple[float, float] | None = None,
    unknown_as_one: bool = False,
) -> Tensor:
    """w = exp(log_q - log_behavior) of every trajectory, clipped; the `weights` of any loss here.

    The losses have the same zero under any behaviour with full support, so weights are optional: they make a
    batch stand for on-policy ones, at the price of variance. Choose them where the behaviour lags the policy
    (stale or tempered rollouts) and the model cannot fit everything. A clip bounds the variance and changes
    the gradient, not the zero. The published codes clip above only, or to (1 - eps, 1 + eps) (FlowRL,
    arXiv:2509.15207), and take per-token means in some places; these are ratios of whole trajectories.

    Args:
        log_q: log q(x) under the policy that is trained, the stop included.
        log_behavior: log of the density that drew x, in the precision that drew it; NaN where unknown.
        clip: the largest weight, or (smallest, largest); None does not clip.
        unknown_as_one: a NaN in log_behavior counts as the weight 1 (a demonstration) instead of an error.

    Returns: (N,) float32, or float64 of float64 inputs; no gradient.
    Raises: TypeError or ValueError on a dtype, shape, device or clip. A NaN behaviour raises where values are
        read (CPU, or debug); elsewhere its weight is NaN.
    """
    checks.check_floating(NAME, "log_q", log_q)
    checks.check_shape(NAME, "log_q", log_q, ("N",), "pass one value per trajectory")
    checks.check_floating(NAME, "log_behavior", log_behavior)
    checks.check_shape(
        NAME, "log_behavior", log_behavior, tuple(log_q.shape), "pass one value per trajectory"
    )
    checks.check_same_device(NAME, log_q=log_q, log_behavior=log_behavior)
    low, high = _bounds(clip)
    dtype = torch.promote_types(torch.float32, torch.promote_types(log_q.dtype, log_behavior.dtype))
    unknown = log_behavior.detach().isnan()
    if not unknown_as_one and not torch.compiler.is_compiling() and values.are_read(unknown):
        want, fix = "known (not NaN)", "pass unknown_as_one=True to weigh such trajectories by 1"
        checks.check(not bool(unknown.any()), NAME, "log_behavior", want, "NaN", fix)
    weights = (log_q.detach().double() - log_behavior.detach().double()).exp().clamp(low, high)
    return (weights.masked_fill(unknown, 1.0) if unknown_as_one else weights).to(dtype)


def _bounds(clip: float | tuple[float, float] | None) -> tuple[float, float]:
    if clip is None:
        return 0.0, float("inf")
    low, high = clip if isinstance(clip, tuple | list) else (0.0, clip)
    fix = "pass the largest weight or (smallest, largest)"
    checks.check(0 <= low <= high and high > 0, NAME, "clip", "0 <= low <= high", clip, fix)
    return float(low), float(high)
