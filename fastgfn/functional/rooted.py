"""Rooted-prefix trajectory balance on padded tensors.

Conventions as in `subtb.py`: log_pf without the stop, log_pterm and log_reward of every prefix, n = lengths,
U_k = (sum of log_pf[:k]) + log_pterm[k] - log_reward[k].

Settings of the rooted prefixes, with the values of the published class as defaults:
    prefix_weight  eta, of the second term; 0 leaves trajectory balance.
    k_min, k_max   the prefixes that take part: k_min <= k <= h = min(n, k_max), tokens; k_max None: n.
    subtb_lambda   w_k proportional to subtb_lambda^(k - k_min), summing to 1 over the row's prefixes.
    log_prior, prior_scale    u_k = log_reward[k] - prior_scale log_prior[k], the reward of the task alone;
                   log_prior[k] is log p_prior(prefix k, then stop). None: u = log_reward.
    missing_reward, tolerance a prefix has no reward of its own where |u_k - missing_reward| <= tolerance.
    max_share      u_k^tgt = max_share max_j u_j + (1 - max_share) soft_k, over terminable k <= j <= h, with
    soft_beta, soft_rho       soft_k = (1/soft_beta) log sum_j exp(soft_beta (u_j - soft_rho (j - k))).
    gamma          alpha_k = gamma^(h - k) at the prefixes without a reward of their own, else 0. With k_max
                   only where k < k_max and n >= k_max.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import _rows, _states
from fastgfn.functional._rows import Reduction
from fastgfn.ops.residual import residual_loss


class _Settings(NamedTuple):
    prior_scale: float
    k_min: int
    k_max: int | None
    subtb_lambda: float
    gamma: float
    max_share: float
    soft_beta: float
    soft_rho: float
    missing_reward: float
    tolerance: float


def rooted_prefix_tb_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_z: Tensor | None = None,  # () | (N,) floating point
    log_prior: Tensor | None = None,  # (N, T + 1)
    prior_scale: float = 1.0,
    prefix_weight: float = 0.25,
    k_min: int = 2,
    k_max: int | None = None,
    subtb_lambda: float = 1.0,
    gamma: float = 0.99,
    max_share: float = 0.5,
    soft_beta: float = 5.0,
    soft_rho: float = 0.0,
    missing_reward: float = 0.0,
    tolerance: float = 1e-6,
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    residual_limit: float | None = None,
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    terminable: Tensor | None = None,  # (N, T + 1) bool
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of (log_z + U_n)^2 + eta sum_k w_k (U_k - U_0 + alpha_k (u_k - u_k^tgt))^2, without a gradient to
    log_pterm in the second term nor through u; the settings are the module's.

    Fixed point: where every prefix has a reward (alpha = 0) R's posterior, with log_z = log Z. With sparse
    rewards the terms contradict each other at prefixes that are also drawn whole, and a minimum is not R's
    posterior. Choose it for sparse rewards, where SubTB's windows drive the stop probabilities away.
    What differs: log_z None (VarGrad); a maximum over present prefixes only (the published one includes 0).
    Source: Wang et al. 2026 (arXiv:2603.00454) and its published code.

    Args, returns, raises, numerics: as `modified_subtb_loss`; log_z and group_ids as
        `trajectory_balance_loss`. A row that ends where it may not stop holds no trajectory: it adds nothing.
    """
    name = "rooted_prefix_tb_loss"
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    settings = _Settings(
        *(prior_scale, k_min, k_max, subtb_lambda, gamma, max_share, soft_beta, soft_rho),
        *(missing_reward, tolerance),
    )
    fix = "0 leaves trajectory balance"
    checks.check(prefix_weight >= 0, name, "prefix_weight", ">= 0", prefix_weight, fix)
    rows = _prepared(
        options, log_pf, log_pterm, log_reward, lengths, log_z, log_prior, terminable, settings, debug
    )
    return _loss(options, rows, settings, prefix_weight)


def rooted_prefix_terms(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_z: Tensor | None = None,  # () | (N,) floating point
    log_prior: Tensor | None = None,  # (N, T + 1)
    prior_scale: float = 1.0,
    k_min: int = 2,
    k_max: int | None = None,
    subtb_lambda: float = 1.0,
    gamma: float = 0.99,
    max_share: float = 0.5,
    soft_beta: float = 5.0,
    soft_rho: float = 0.0,
    missing_reward: float = 0.0,
    tolerance: float = 1e-6,
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    terminable: Tensor | None = None,  # (N, T + 1) bool
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """The second term of `rooted_prefix_tb_loss` prefix by prefix, before phi.

    Returns: (N, T + 1) float64 residuals U_k - U_0 + alpha_k (u_k - u_k^tgt), differentiable in log_pf,
        log_reward and log_z, and their (N, T + 1) float64 weights w_k; both 0 elsewhere.
    """
    options = Reduction(
        "rooted_prefix_terms", "batch", "none", "squared", None, None, counts, group_ids, False
    )
    settings = _Settings(
        *(prior_scale, k_min, k_max, subtb_lambda, gamma, max_share, soft_beta, soft_rho),
        *(missing_reward, tolerance),
    )
    rows = _prepared(
        options, log_pf, log_pterm, log_reward, lengths, log_z, log_prior, terminable, settings, debug
    )
    return _terms(rows, settings)


class _Batch(NamedTuple):
    path: Tensor  # (N, T + 1) float64
    log_pterm: Tensor  # (N, T + 1) float64, 0 where not valid
    log_reward: Tensor  # (N, T + 1) float64, 0 where not valid
    task: Tensor  # (N, T + 1) float64 u, detached
    valid: Tensor  # (N, T + 1) bool
    lengths: Tensor  # (N,)
    log_z: Tensor  # () | (N,) float64
    dtype: torch.dtype


def _prepared(
    options: Reduction,
    log_pf: Tensor,
    log_pterm: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    log_z: Tensor | None,
    log_prior: Tensor | None,
    terminable: Tensor | None,
    settings: _Settings,
    debug: bool,
) -> _Batch:
    name = options.function
    states = {"log_pterm": log_pterm, "log_reward": log_reward, "log_prior": log_prior}
    log_pf, *values = _rows.prepared(name, log_pf, lengths, states=states)
    if terminable is not None:
        _states.check_mask(name, log_reward, terminable)
    _rows.check_options(options, lengths, grouped=log_z is None)
    _rows.check_log_z(name, lengths, log_z)
    _check_settings(name, settings)
    ok, fix = log_prior is not None or settings.prior_scale in (0, 1), "pass log_prior"
    checks.check(ok, name, "prior_scale", "0 or 1 without log_prior", settings.prior_scale, fix)
    _, valid = _rows.masks(lengths, log_pf.shape[1])
    valid = valid if terminable is None else valid & terminable
    values = [None if x is None else torch.where(valid, x, 0) for x in values]
    named = dict(zip(states, values, strict=True))
    _rows.check_values(name, debug, lengths, log_pf=log_pf, log_z=log_z, **named)
    log_pterm, log_reward, log_prior = (None if x is None else x.double() for x in values)
    bad = _rows.out_of_range(name, lengths, log_pf.shape[1])
    path = _states.paths(log_pf, lengths).masked_fill(bad[:, None], torch.nan)
    dtype = log_pf.dtype if log_z is None else torch.promote_types(log_pf.dtype, log_z.dtype)
    if log_z is None:
        delta = _states.last(path + log_pterm - log_reward, lengths)
        log_z = _rows.group_mean(-delta.detach(), _states.last(valid, lengths), options)
    task = log_reward if log_prior is None else log_reward - settings.prior_scale * log_prior
    return _Batch(path, log_pterm, log_reward, task.detach(), valid, lengths, log_z.double(), dtype)


def _loss(
    options: Reduction, rows: _Batch, settings: _Settings, prefix_weight: float
) -> Tensor | tuple[Tensor, Tensor]:
    whole = rows.log_z + _states.last(rows.path + rows.log_pterm - rows.log_reward, rows.lengths)
    num = residual_loss(whole, options.loss, options.residual_limit)
    if prefix_weight > 0:
        residual, weight = _terms(rows, settings)
        prefixes = residual_loss(residual, options.loss, options.residual_limit)
        num = num + prefix_weight * (weight * prefixes).sum(1)
    used = _states.last(rows.valid, rows.lengths)
    # its first entry is 0, or NaN where the length is out of range
    num = torch.where(used, num, rows.path[:, 0])
    return _rows.reduced(num, used.double(), options, rows.dtype)


def _terms(rows: _Batch, settings: _Settings) -> tuple[Tensor, Tensor]:
    k = torch.arange(rows.path.shape[1], device=rows.path.device)[None]
    horizon = rows.lengths[:, None].long()
    if settings.k_max is not None:
        horizon = horizon.clamp(max=settings.k_max)
    taking = rows.valid & (k >= settings.k_min) & (k <= horizon)
    # 0^0 = 1: lambda = 0 keeps the shortest.
    weight = torch.full_like(rows.path, settings.subtb_lambda) ** (k - settings.k_min).clamp(min=0) * taking
    weight = weight / _rows.nonzero(weight.sum(1, keepdim=True))
    u = rows.path + rows.log_pterm.detach() - rows.log_reward
    root = torch.where(rows.valid[:, 0], u[:, 0], -rows.log_z)
    residual = u - root[:, None] + _correction(rows, settings, k, horizon)
    return torch.where(taking, residual, 0), weight


@torch.no_grad()
def _correction(rows: _Batch, settings: _Settings, k: Tensor, horizon: Tensor) -> Tensor:
    """(N, T + 1) alpha_k (u_k - u_k^tgt)."""
    absent = rows.valid & ((rows.task - settings.missing_reward).abs() <= settings.tolerance) & (k <= horizon)
    if settings.k_max is not None:
        absent = absent & (k < settings.k_max) & (rows.lengths[:, None] >= settings.k_max)
    beta, drop = settings.soft_beta, settings.soft_rho * k.double()
    future = torch.where(rows.valid & (k <= horizon), rows.task, -torch.inf).flip(1)
    largest = future.cummax(1).values.flip(1)
    soft = (beta * (future - drop.flip(1))).logcumsumexp(1).flip(1) / beta + drop
    target = settings.max_share * largest + (1 - settings.max_share) * soft
    alpha = settings.gamma ** (horizon - k).clamp(min=0).double()
    return torch.where(absent, alpha * (rows.task - target), 0)


def _check_settings(name: str, settings: _Settings) -> None:
    _rows.check_lambda(name, settings.subtb_lambda)
    k_min, k_max = settings.k_min, settings.k_max
    for arg, ok, want, fix in (
        ("prior_scale", settings.prior_scale >= 0, ">= 0", "0 leaves u = log_reward"),
        ("k_min", k_min >= 1, ">= 1", "the root is measured against itself at 0"),
        ("k_max", k_max is None or k_max >= k_min, f"None or >= k_min = {k_min}", "None takes every prefix"),
        ("gamma", 0 <= settings.gamma <= 1, "in [0, 1]", "1 corrects every prefix alike, 0 the last alone"),
        ("max_share", 0 <= settings.max_share <= 1, "in [0, 1]", "0 takes the soft maximum alone"),
        ("soft_beta", settings.soft_beta > 0, "> 0", "a large one approaches the maximum"),
        ("soft_rho", settings.soft_rho >= 0, ">= 0", "0 does not discount distance"),
        ("tolerance", settings.tolerance >= 0, ">= 0", "a negative one corrects nothing; use prefix_weight"),
    ):
        checks.check(ok, name, arg, want, getattr(settings, arg), fix)
