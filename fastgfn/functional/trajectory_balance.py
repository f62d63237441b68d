"""Trajectory balance and its family on padded tensors: one residual per whole trajectory.

    residual = log_z + (1/m) sum of (log_pf - log_pb - log_prior)[:lengths] - beta log_reward
    loss     = mean of phi(residual), phi(r) = r^2 unless `loss` says otherwise

with m = 1, or m = lengths under length_normalize. In this form log_pf holds the stop as its last transition,
so that the sum is log q(x) (where the stop is certain its entry is 0, or is left out: m counts the entries).
log_reward is that of the whole trajectory, so none of these needs the reward of a prefix.

    log_z given                 trajectory balance (Malkin et al. 2022, arXiv:2201.13259): a scalar or a head
    log_z None                  VarGrad: minus the detached mean over the group of the rest of the residual
                                (Richter et al. 2020, arXiv:2010.10436; Zhang et al. 2023, arXiv:2302.05446)
    log_prior, beta             relative trajectory balance (Venkatraman et al. 2024, arXiv:2405.20971)
    length_normalize            length-normalised trajectory balance (FlowRL, arXiv:2509.15207)

Conventions, reductions, weights and counts: `subtb.py`, with a total weight of 1 per row; "batch" and
"trajectory" are therefore the same. A row of length 0 holds no trajectory: it adds nothing anywhere and its
log_reward is not read. The estimate of log_z counts rows by `counts` and ignores `weights`.
"""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import _rows
from fastgfn.functional._rows import Reduction
from fastgfn.ops.residual import residual_loss


def trajectory_balance_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_reward: Tensor,  # (N,) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_z: Tensor | None = None,  # () | (N,) floating point
    log_pb: Tensor | None = None,  # (N, T)
    log_prior: Tensor | None = None,  # (N, T)
    beta: float = 1.0,
    length_normalize: bool = False,
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    residual_limit: float | None = None,
    half: bool = False,
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of phi(log_z + (1/m) sum of (log_pf - log_pb - log_prior) - beta log_reward); see the module.

    Fixed point: q(x) proportional to prior(x) R(x)^beta, without a prior R's posterior, and log_z its log
    normaliser. Under length_normalize it is (prior^(1/m) R^beta / e^log_z)^m: not R's posterior.
    Choose it where only whole trajectories have a reward; a learned log_z serves batches of one trajectory
    per prompt, None those of several.
    What differs: FlowRL's clipped importance weights are `weights`, and its reward is not normalised here.
    Source: Malkin et al. 2022 (arXiv:2201.13259); of the options, see the module.

    Args:
        log_pf: log q of every action, the stop last.
        log_z: a value for all rows, or one per row (a head, or a table of prompts gathered); gets a gradient.
            None: VarGrad over group_ids (None: over the batch).
        log_prior: log p_prior of the same transitions; beta: only beside it or length_normalize.
        half: the loss "half_squared", as relative trajectory balance is published in torchgfn.
        The others: as `subtb_loss`.

    Returns, raises, numerics: as `subtb_loss`; O(T).
    """
    name = "trajectory_balance_loss"
    loss = _loss_name(name, loss, half)
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    return _loss(
        options, log_pf, log_reward, lengths, log_z, log_pb, log_prior, beta, length_normalize, debug
    )


def vargrad_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_reward: Tensor,  # (N,) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    log_pb: Tensor | None = None,  # (N, T)
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    residual_limit: float | None = None,
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of (delta - m)^2, delta = log q(x) - log R(x), m the group's detached mean of delta.

    `trajectory_balance_loss` with log_z None; contrastive trajectory balance and the log-partition variance
    are this functional. Its gradient is that of the variance of delta (with the square and without weights).
    What differs: torchgfn takes one mean per batch, here a group (a prompt) has its own.
    Fixed point: q proportional to R on the group's trajectories, R's posterior where they cover it. Choose it
    where a prompt has several trajectories: nothing has to be learned beside the policy. A group of one adds
    nothing.
    Source: Richter et al. 2020 (arXiv:2010.10436), Zhang et al. 2023 (arXiv:2302.05446).

    Args, returns, raises, numerics: as `trajectory_balance_loss`.
    """
    options = Reduction(
        "vargrad_loss",
        normalization,
        reduction,
        loss,
        residual_limit,
        weights,
        counts,
        group_ids,
        return_weight,
    )
    return _loss(options, log_pf, log_reward, lengths, None, log_pb, None, 1.0, False, debug)


def relative_trajectory_balance_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_prior: Tensor,  # (N, T) floating point
    log_reward: Tensor,  # (N,) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    beta: float = 1.0,
    log_z: Tensor | None = None,  # () | (N,) floating point
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    residual_limit: float | None = None,
    half: bool = False,
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of (log_z + log q(x) - log p_prior(x) - beta log R(x))^2.

    `trajectory_balance_loss` with a prior. Fixed point: q proportional to p_prior(x) R(x)^beta, the posterior
    of the prior under the likelihood R^beta (with R = 1 the prior itself, not R's posterior). Choose it where
    the reward is a likelihood or a score on top of a frozen model, whose log-probs then need not be part of
    log_reward. Trust-PCL is 1/beta^2 times it.
    What differs: torchgfn halves the square (half=True); the prior never gets a gradient there, here it gets
    one if it requires one.
    Source: Venkatraman et al. 2024 (arXiv:2405.20971).

    Args, returns, raises, numerics: as `trajectory_balance_loss`.
    """
    name = "relative_trajectory_balance_loss"
    loss = _loss_name(name, loss, half)
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    return _loss(options, log_pf, log_reward, lengths, log_z, None, log_prior, beta, False, debug)


def trajectory_balance_residual(
    log_pf: Tensor,  # (N, T) floating point
    log_reward: Tensor,  # (N,) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_z: Tensor | None = None,  # () | (N,) floating point
    log_pb: Tensor | None = None,  # (N, T)
    log_prior: Tensor | None = None,  # (N, T)
    beta: float = 1.0,
    length_normalize: bool = False,
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    debug: bool = False,
) -> Tensor:
    """(N,) the residuals of `trajectory_balance_loss`, 0 in rows of length 0; differentiable."""
    options = Reduction(
        "trajectory_balance_residual", "batch", "none", "squared", None, None, counts, group_ids, False
    )
    args = log_pf, log_reward, lengths, log_z, log_pb, log_prior, beta, length_normalize, debug
    residual, dtype = _residual(options, *args)
    return residual.to(dtype)


def _loss_name(name: str, loss: str, half: bool) -> str:
    have, fix = repr(loss), "half halves the square; drop it beside another loss"
    checks.check(not half or loss == "squared", name, "loss", "'squared' beside half", have, fix)
    return "half_squared" if half else loss


def _loss(
    options: Reduction,
    log_pf: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    log_z: Tensor | None,
    log_pb: Tensor | None,
    log_prior: Tensor | None,
    beta: float,
    length_normalize: bool,
    debug: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    args = log_pf, log_reward, lengths, log_z, log_pb, log_prior, beta, length_normalize, debug
    residual, dtype = _residual(options, *args)
    num = residual_loss(residual, options.loss, options.residual_limit)
    return _rows.reduced(num, (lengths > 0).double(), options, dtype)


def _residual(
    options: Reduction,
    log_pf: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    log_z: Tensor | None,
    log_pb: Tensor | None,
    log_prior: Tensor | None,
    beta: float,
    length_normalize: bool,
    debug: bool,
) -> tuple[Tensor, torch.dtype]:
    """(N,) float64 residuals and the dtype of the results."""
    name = options.function
    steps = {"log_pb": log_pb, "log_prior": log_prior}
    log_pf, log_pb, log_prior, log_reward = _rows.prepared(
        name, log_pf, lengths, steps=steps, rows={"log_reward": log_reward}
    )
    _rows.check_options(options, lengths, grouped=log_z is None)
    _rows.check_log_z(name, lengths, log_z)
    checks.check(beta > 0, name, "beta", "> 0", beta, "1 keeps log_reward as it is")
    plain = log_prior is None and not length_normalize
    fix = "pass log_prior or length_normalize=True, or temper log_reward itself"
    checks.check(not plain or beta == 1, name, "beta", "1 without log_prior", beta, fix)
    dtype = log_pf.dtype if log_z is None else torch.promote_types(log_pf.dtype, log_z.dtype)
    used = lengths > 0
    named = dict(log_pf=log_pf, log_pb=log_pb, log_prior=log_prior, log_z=log_z)
    _rows.check_values(name, debug, lengths, **named, log_reward=torch.where(used, log_reward, 0))
    is_step, _ = _rows.masks(lengths, log_pf.shape[1])
    delta = _path(log_pf, is_step)
    for minus in (log_pb, log_prior):
        delta = delta if minus is None else delta - _path(minus, is_step)
    if length_normalize:
        delta = delta / lengths.clamp(min=1)
    delta = delta - beta * log_reward.double()
    if log_z is None:
        log_z = _rows.group_mean(-delta.detach(), used, options)
    residual = torch.where(used, delta + log_z.double(), 0)
    return residual.masked_fill(_rows.out_of_range(name, lengths, log_pf.shape[1]), torch.nan), dtype


def _path(log_probs: Tensor, is_step: Tensor) -> Tensor:
    """(N,) float64 sums of the transitions of every row."""
    return torch.where(is_step, log_probs, 0).double().sum(1)
