"""Sub-trajectory balance on padded tensors, for host libraries.

Shared conventions. N trajectories, T padded transitions, natural logarithms. `lengths` counts transitions, so
row n has the states 0..lengths[n]; state tensors have one column more than transition tensors. Padding is
ignored (it may be NaN) and receives exactly zero gradient. float16 and bfloat16 are computed and returned as
float32, float64 as float64; sums are float64. Any strides, no host synchronisation, same bits on repeat.
Values (lengths out of range, NaN, infinity) are checked only under debug=True or FASTGFN_DEBUG=1, as that
synchronises; out-of-range lengths raise on CPU and give NaN on CUDA either way (for a squared loss).

Reductions, with num and den the weighted loss and the total weight of a row's windows, w `weights`
(importance weights: numerator only), c `counts` (how many times the row stands in the batch: both):
    "batch": sum = sum(w c num), mean = sum / sum(c den), none = w c num.
    "trajectory": r = num / den; sum = sum(w c r), mean = sum / sum(c) over rows with den > 0, none = w r.
    "group": a prompt's (`group_ids`) ratio is sum(w c num) / sum(c den) over its rows; sum and mean are over
        the prompts with a positive denominator, none = w c num / (the prompt's sum of c den).
An empty batch or a zero total gives 0 with zero gradients. `return_weight=True` returns (loss, weight (N,)),
where "mean" is "sum" / weight.sum(), so that both sums can be all-reduced for an exact global mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn import checks
from fastgfn.functional import values
from fastgfn.ops import subtb as ops

LOSSES = ("squared", "half_squared", "huber", "shifted_cosh", "linex")
NORMALIZATIONS = ("batch", "trajectory", "group")
REDUCTIONS = ("mean", "sum", "none")


class _Reduction(NamedTuple):
    function: str
    normalization: str
    reduction: str
    loss: str
    weights: Tensor | None
    counts: Tensor | None
    group_ids: Tensor | None
    return_weight: bool


def subtb_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_flow: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_pb: Tensor | None = None,  # (N, T)
    subtb_lambda: float = 1.0,
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sub-trajectory balance: the windows (i < j) of every row, weighted by subtb_lambda^(j-i-1).

    The residual of a window is log_flow[i] + sum of (log_pf - log_pb)[i:j] - log_flow[j].

    Args:
        log_flow: log F(s_t); the column lengths[n] holds log R(x) (or the flow of the terminating state).
        log_pb: log P_B of the same transitions; None is 0 (a tree).
        subtb_lambda: in [0, 1]; 0 is detailed balance, 1 weights every window equally.
        loss: of the residual r: "squared" r^2, "half_squared" r^2 / 2, both O(T); "huber" (delta 1),
            "shifted_cosh" e^r + e^-r - 2, "linex" e^r - r - 1, all three O(T^2) time in bounded memory.
        weights, counts, group_ids, normalization, reduction, return_weight, debug: see the module.

    Returns: scalar, or (N,) for reduction "none"; with return_weight, (loss, weight (N,) float64).
    Raises: TypeError or ValueError on a dtype, shape, device or option; under debug, RuntimeError on a value.
    Numerics: float64 sums in the shift form; fp32 inputs give about 1e-7 relative error at T = 512.
    Source: Madan et al. 2023 (arXiv:2209.12782).
    """
    options = _Reduction(
        "subtb_loss", normalization, reduction, loss, weights, counts, group_ids, return_weight
    )
    log_pf, log_flow = _prepared(options.function, log_pf, {"log_flow": log_flow}, lengths, log_pb)
    _check_options(options, lengths, subtb_lambda)
    _check_values(options.function, debug, lengths, log_pf=log_pf, log_flow=log_flow)
    return _reduced(log_pf, log_flow, lengths, subtb_lambda, options)


def modified_subtb_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    subtb_lambda: float = 1.0,
    normalization: str = "batch",
    reduction: str = "mean",
    loss: str = "squared",
    weights: Tensor | None = None,  # (N,) floating point
    counts: Tensor | None = None,  # (N,)
    group_ids: Tensor | None = None,  # (N,) int32 | int64
    include_sink: bool = False,
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subtb_loss` where every state may stop: log_flow = log_reward - log_pterm.

    Args:
        log_pf: log q(token t+1 | state t), before the termination token.
        log_pterm: log q(stop | state t), the column lengths[n] included.
        log_reward: log R(state t, then stop), already tempered.
        include_sink: also count the state after the termination, a copy of the last state: a row then has
            (n+1)(n+2)/2 windows, also for n = 0.
        The others: as `subtb_loss`.

    Returns, raises, numerics: as `subtb_loss`. log_reward gets a gradient only if it requires one.
    Source: Hu et al. 2024 (arXiv:2310.04363).
    """
    options = _Reduction(
        "modified_subtb_loss", normalization, reduction, loss, weights, counts, group_ids, return_weight
    )
    log_pf, log_pterm, log_reward = _prepared(
        options.function, log_pf, {"log_pterm": log_pterm, "log_reward": log_reward}, lengths
    )
    _check_options(options, lengths, subtb_lambda)
    _check_values(options.function, debug, lengths, log_pf=log_pf, log_pterm=log_pterm, log_reward=log_reward)
    log_flow = log_reward - log_pterm
    if include_sink:
        log_pf, log_flow, lengths = _with_sink(log_pf, log_flow, lengths)
    return _reduced(log_pf, log_flow, lengths, subtb_lambda, options)


def subtb_potential(
    log_pf: Tensor,  # (N, T) floating point
    log_flow: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_pb: Tensor | None = None,  # (N, T)
    debug: bool = False,
) -> Tensor:
    """Potential b_t = log_flow[t] - sum of (log_pf - log_pb)[:t]; a window's residual is b_i - b_j.

    Returns: (N, T + 1), 0 on padding; differentiable in every log tensor. O(T).
    Raises: as `subtb_loss`.
    """
    log_pf, log_flow = _prepared("subtb_potential", log_pf, {"log_flow": log_flow}, lengths, log_pb)
    _check_values("subtb_potential", debug, lengths, log_pf=log_pf, log_flow=log_flow)
    is_step, is_state = _masks(lengths, log_pf.shape[1])
    path = pad(torch.where(is_step, log_pf, 0).double().cumsum(1), (1, 0))
    return torch.where(is_state, log_flow.double() - path, 0).to(log_flow.dtype)


def termination_log_prob(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    debug: bool = False,
) -> Tensor:
    """log q(x) = sum of log_pf[:n] + log_pterm[n], n = lengths: the exact density of each row on a tree.

    Returns: (N,) nats, differentiable in log_pf and log_pterm.
    Raises: as `subtb_loss`.
    """
    log_pf, log_pterm = _prepared("termination_log_prob", log_pf, {"log_pterm": log_pterm}, lengths)
    _check_values("termination_log_prob", debug, lengths, log_pf=log_pf, log_pterm=log_pterm)
    is_step, is_state = _masks(lengths, log_pf.shape[1])
    is_last = is_state & ~pad(is_step, (0, 1))
    total = torch.where(is_step, log_pf, 0).double().sum(1) + torch.where(is_last, log_pterm, 0).double().sum(
        1
    )
    return total.to(log_pf.dtype)


def _masks(lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    state = torch.arange(width + 1, device=lengths.device)[None]
    return state[:, :-1] < lengths[:, None], state <= lengths[:, None]


def _with_sink(log_pf: Tensor, log_flow: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append a copy of the last state to every row, reached with probability 1."""
    is_step, _ = _masks(lengths, log_pf.shape[1])
    column = torch.arange(log_flow.shape[1] + 1, device=lengths.device)[None]
    log_flow = log_flow.gather(1, torch.minimum(column, lengths.long()[:, None]))
    return pad(torch.where(is_step, log_pf, 0), (0, 1)), log_flow, lengths + 1


def _prepared(
    function: str, log_pf: Tensor, states: dict[str, Tensor], lengths: Tensor, log_pb: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Check dtypes, shapes and devices; return log_pf - log_pb and the state tensors in the compute dtype."""
    checks.check_floating(function, "log_pf", log_pf)
    checks.check_shape(function, "log_pf", log_pf, ("N", "T"), "pass one row per trajectory")
    n, t = log_pf.shape
    for name, tensor in states.items():
        checks.check_floating(function, name, tensor)
        fix = "pass one column per state, one more than log_pf"
        checks.check_shape(function, name, tensor, (n, t + 1), fix)
    checks.check_integer(function, "lengths", lengths)
    checks.check_shape(function, "lengths", lengths, (n,), "pass the number of transitions of each row")
    if log_pb is not None:
        checks.check_floating(function, "log_pb", log_pb)
        checks.check_shape(function, "log_pb", log_pb, (n, t), "pass one value per transition")
    checks.check_same_device(function, log_pf=log_pf, **states, lengths=lengths, log_pb=log_pb)
    dtype = torch.float32
    for tensor in (log_pf, log_pb, *states.values()):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    net = log_pf.to(dtype) if log_pb is None else log_pf.to(dtype) - log_pb.to(dtype)
    return net, *(tensor.to(dtype) for tensor in states.values())


def _check_options(options: _Reduction, lengths: Tensor, subtb_lambda: float) -> None:
    function = options.function
    for arg, value, allowed in (
        ("normalization", options.normalization, NORMALIZATIONS),
        ("reduction", options.reduction, REDUCTIONS),
        ("loss", options.loss, LOSSES),
    ):
        checks.check(value in allowed, function, arg, "one of " + ", ".join(allowed), repr(value), "pick one")
    fix = "1 weights every window equally, 0 keeps windows of one step"
    checks.check(0 <= subtb_lambda <= 1, function, "subtb_lambda", "in [0, 1]", subtb_lambda, fix)
    rows = {"weights": options.weights, "counts": options.counts, "group_ids": options.group_ids}
    for name, tensor in rows.items():
        if tensor is not None:
            checks.check_shape(function, name, tensor, (lengths.shape[0],), "pass one entry per row")
    checks.check_same_device(function, lengths=lengths, **rows)
    if options.weights is not None:
        checks.check_floating(function, "weights", options.weights)
    grouped = options.normalization == "group"
    if options.group_ids is not None:
        checks.check_integer(function, "group_ids", options.group_ids)
    want = "given" if grouped else "None"
    have = "None" if options.group_ids is None else "a tensor"
    fix = "group_ids goes with normalization='group'"
    checks.check(grouped == (options.group_ids is not None), function, "group_ids", want, have, fix)


def _check_values(function: str, debug: bool, lengths: Tensor, **tensors: Tensor) -> None:
    if not (debug or values.is_debug()):
        return
    width = tensors["log_pf"].shape[1]
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= width:
            want, fix = f"in [0, T] = [0, {width}]", "pass the number of transitions of each row"
            checks.fail(function, f"lengths[{row}]", want, length, fix, kind=RuntimeError)
    is_step, is_state = _masks(lengths, width)
    for name, tensor in tensors.items():
        bad = ~tensor.isfinite() & (is_step if name == "log_pf" else is_state)
        if bool(bad.any()):
            row, t = bad.nonzero()[0].tolist()
            value, fix = float(tensor[row, t]), "mask the impossible moves, or clamp log_reward"
            checks.fail(function, f"{name}[{row}, {t}]", "finite", value, fix, kind=RuntimeError)


def _reduced(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float, options: _Reduction
) -> Tensor | tuple[Tensor, Tensor]:
    if options.loss in ("squared", "half_squared"):
        num, den = ops.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    else:
        num, den = ops.subtb_pairwise(log_pf, log_flow, lengths, subtb_lambda, options.loss)
    num = num.double()
    if options.weights is not None:
        num = num * options.weights.double()
    factor, weight = _factors(den, options)
    value = num * factor if options.reduction == "none" else num.dot(factor)
    value = value.to(log_pf.dtype)
    return (value, weight) if options.return_weight else value


@torch.no_grad()
def _factors(den: Tensor, options: _Reduction) -> tuple[Tensor, Tensor]:
    """(N,) what every numerator is multiplied by, and the weight of its row; "mean" divides by their sum."""
    den = den.double()
    counts = 1.0 if options.counts is None else options.counts.double()
    if options.normalization == "batch":
        weight = den * counts
        factor = torch.ones_like(den) * counts
    elif options.normalization == "trajectory":
        weight = (den > 0) * counts * torch.ones_like(den)
        factor = 1.0 / _nonzero(den)
        if options.reduction != "none":
            factor = factor * counts
    else:
        factor = counts / _nonzero(_group_totals(den * counts, options.group_ids))
        weight = den * factor
    if options.loss == "half_squared":
        factor = 0.5 * factor
    return factor / _nonzero(weight.sum()) if options.reduction == "mean" else factor, weight


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def _group_totals(values: Tensor, group_ids: Tensor) -> Tensor:
    """(N,) the sum of values over the row's group, for any ids; static shapes and a fixed summation order."""
    ordered, order = group_ids.sort(stable=True)
    dense = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    totals = torch.zeros_like(values).index_put((dense,), values[order], accumulate=True)
    return torch.zeros_like(values).scatter(0, order, totals[dense])
