"""Interpolated sub-trajectory balance on padded tensors; conventions as in `subtb.py`."""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import _rows, _states, subtb
from fastgfn.functional._rows import Reduction


def interpolated_log_reward(
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    segment: int,
    *,
    terminable: Tensor | None = None,  # (N, T + 1) bool
) -> Tensor:
    """log R where it is known, linear in the number of tokens between.

    It is known at every prefix whose length is a multiple of segment and at the first and the last one that
    may stop, which of a finished trajectory is the whole; log_reward is read nowhere else.

    Returns: (N, T + 1), 0 on padding and where terminable is False; differentiable.
    Raises: TypeError or ValueError on a dtype, shape or device, or segment < 1.
    """
    name = "interpolated_log_reward"
    checks.check_floating(name, "log_reward", log_reward)
    checks.check_shape(name, "log_reward", log_reward, ("N", "T + 1"), "pass one column per state")
    checks.check_integer(name, "lengths", lengths)
    checks.check_shape(name, "lengths", lengths, (log_reward.shape[0],), "pass one value per row")
    checks.check_same_device(name, log_reward=log_reward, lengths=lengths)
    _states.check_anchor(name, log_reward, terminable, None)
    _check_segment(name, segment)
    dtype = torch.promote_types(torch.float32, log_reward.dtype)
    bad = _rows.out_of_range(name, lengths, log_reward.shape[1] - 1)
    value = _states.interpolated(log_reward.to(dtype), lengths, segment, terminable)
    return value.masked_fill(bad[:, None], torch.nan)


def interpolated_subtb_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    segment: int = 8,
    subtb_lambda: float = 1.0,
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    residual_limit: float | None = None,
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    terminable: Tensor | None = None,  # (N, T + 1) bool
    log_z: Tensor | None = None,  # () | (N,) floating point
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`modified_subtb_loss` on `interpolated_log_reward`: sum over windows of lambda^(j-i-1) (U_j - U_i)^2.

    Fixed point: U constant along every trajectory, q(prefix k, then stop) proportional to the interpolated
    reward. That is R's posterior only if log R is linear between the knots. Else it is not, and since a
    prefix is interpolated towards every trajectory it lies on, no q at all may have zero loss. Choose it
    where the reward of a prefix is a forward pass that cannot be shared, and accept the bias.
    What differs: the published code, which interpolates log R too, starts at a minimum length, takes steps of
    12 to 16 and leaves the tail after the last evaluation without a value; here the tail is interpolated to
    the trajectory's own reward.
    Source: Sun et al. 2025 (LaCoT, arXiv:2510.23925), segment 8.

    Args, returns, raises, numerics: as `modified_subtb_loss`; segment >= 1 (1: the same loss).
    """
    name = "interpolated_subtb_loss"
    _check_segment(name, segment)
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    states = log_pf, log_pterm, log_reward, lengths, terminable, log_z
    return subtb.implied(options, *states, subtb_lambda, False, debug, segment)


def _check_segment(name: str, segment: int) -> None:
    ok = isinstance(segment, int) and segment >= 1
    checks.check(ok, name, "segment", "an integer >= 1", segment, "1 reads the reward of every prefix")
