"""What the padded losses share: checks of their arguments, masks, and the reductions over rows (`subtb.py`
says what they mean).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import values
from fastgfn.ops.residual import LOSSES

NORMALIZATIONS = ("batch", "trajectory", "group")
REDUCTIONS = ("mean", "sum", "none")


class Reduction(NamedTuple):
    function: str
    normalization: str
    reduction: str
    loss: str
    residual_limit: float | None
    weights: Tensor | None
    counts: Tensor | None
    group_ids: Tensor | None
    return_weight: bool


def masks(lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(N, T) and (N, T + 1) bool: which columns are transitions and states of the row."""
    state = torch.arange(width + 1, device=lengths.device)[None]
    return state[:, :-1] < lengths[:, None], state <= lengths[:, None]


def prepared(
    function: str,
    log_pf: Tensor,
    lengths: Tensor,
    *,
    steps: dict[str, Tensor | None] | None = None,
    states: dict[str, Tensor | None] | None = None,
    rows: dict[str, Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Check dtypes, shapes and devices; return log_pf, the steps (N, T), the states (N, T + 1) and the rows
    (N,) in the compute dtype, None where None came.
    """
    checks.check_floating(function, "log_pf", log_pf)
    checks.check_shape(function, "log_pf", log_pf, ("N", "T"), "pass one row per trajectory")
    n, t = log_pf.shape
    kinds = (
        (states, (n, t + 1), "pass one column per state, one more than log_pf"),
        (steps, (n, t), "pass one value per transition"),
        (rows, (n,), "pass one value per trajectory"),
    )
    for tensors, shape, fix in kinds:
        for name, tensor in (tensors or {}).items():
            if tensor is not None:
                checks.check_floating(function, name, tensor)
                checks.check_shape(function, name, tensor, shape, fix)
    checks.check_integer(function, "lengths", lengths)
    checks.check_shape(function, "lengths", lengths, (n,), "pass the number of transitions of each row")
    named = (steps or {}) | (states or {}) | (rows or {})
    checks.check_same_device(function, log_pf=log_pf, **named, lengths=lengths)
    dtype = torch.float32
    for tensor in (log_pf, *named.values()):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return log_pf.to(dtype), *(None if x is None else x.to(dtype) for x in named.values())


def check_options(options: Reduction, lengths: Tensor, *, grouped: bool | None = None) -> None:
    """grouped: whether the function reads group_ids; by default where normalization is "group"."""
    function = options.function
    for arg, value, allowed in (
        ("normalization", options.normalization, NORMALIZATIONS),
        ("reduction", options.reduction, REDUCTIONS),
        ("loss", options.loss, LOSSES),
    ):
        checks.check(value in allowed, function, arg, "one of " + ", ".join(allowed), repr(value), "pick one")
    rows = {"weights": options.weights, "counts": options.counts, "group_ids": options.group_ids}
    for name, tensor in rows.items():
        if tensor is not None:
            checks.check_shape(function, name, tensor, (lengths.shape[0],), "pass one entry per row")
    checks.check_same_device(function, lengths=lengths, **rows)
    if options.weights is not None:
        checks.check_floating(function, "weights", options.weights)
    if options.group_ids is not None:
        checks.check_integer(function, "group_ids", options.group_ids)
    _check_groups(options, grouped)
    if options.residual_limit is not None:
        ok, fix = options.loss == "clamped", "it goes with loss='clamped'"
        checks.check(ok, function, "residual_limit", "None", options.residual_limit, fix)
        fix = "a residual beyond it gets no gradient"
        checks.check(
            options.residual_limit > 0, function, "residual_limit", "> 0", options.residual_limit, fix
        )


def _check_groups(options: Reduction, allowed: bool | None) -> None:
    needed = options.normalization == "group"
    have = "None" if options.group_ids is None else "a tensor"
    fix = "group_ids goes with normalization='group'"
    if allowed is False:
        fix += " or with log_z None"
    if options.group_ids is None:
        checks.check(not needed, options.function, "group_ids", "given", have, fix)
    else:
        checks.check(needed or bool(allowed), options.function, "group_ids", "None", have, fix)


def check_lambda(function: str, subtb_lambda: float) -> None:
    fix = "1 weights every window equally, 0 keeps windows of one step"
    checks.check(0 <= subtb_lambda <= 1, function, "subtb_lambda", "in [0, 1]", subtb_lambda, fix)


def check_log_z(function: str, lengths: Tensor, log_z: Tensor | None) -> None:
    if log_z is None:
        return
    fix = "pass one value for all rows, or one per row"
    checks.check(isinstance(log_z, Tensor), function, "log_z", "a tensor or None", log_z, fix)
    checks.check_floating(function, "log_z", log_z)
    shape = tuple(log_z.shape)
    checks.check(
        shape in ((), tuple(lengths.shape)), function, "log_z", f"() or {tuple(lengths.shape)}", shape, fix
    )
    checks.check_same_device(function, lengths=lengths, log_z=log_z)


def out_of_range(function: str, lengths: Tensor, width: int) -> Tensor:
    """(N,) bool: lengths not in [0, width]; they raise where values are read."""
    bad = (lengths < 0) | (lengths > width)
    if not torch.compiler.is_compiling() and values.are_read(lengths) and bool(bad.any()):
        row = int(bad.nonzero()[0])
        want, fix = f"in [0, T] = [0, {width}]", "pass the number of transitions of each row"
        checks.fail(function, f"lengths[{row}]", want, int(lengths[row]), fix)
    return bad


def check_values(function: str, debug: bool, lengths: Tensor, **tensors: Tensor | None) -> None:
    """Under debug: lengths in range, every entry of the tensors finite but the padding."""
    if not (debug or values.is_debug()):
        return
    width = tensors["log_pf"].shape[1]
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= width:
            want, fix = f"in [0, T] = [0, {width}]", "pass the number of transitions of each row"
            checks.fail(function, f"lengths[{row}]", want, length, fix, kind=RuntimeError)
    is_step, is_state = masks(lengths, width)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~tensor.isfinite()
        if tensor.dim() == 2:
            bad = bad & (is_step if tensor.shape[1] == width else is_state)
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            value, fix = float(tensor[tuple(where)]), "mask the impossible moves, or clamp log_reward"
            checks.fail(function, f"{name}{where or ''}", "finite", value, fix, kind=RuntimeError)


def reduced(
    num: Tensor, den: Tensor, options: Reduction, dtype: torch.dtype, *, scale: float = 1.0
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of dtype from num (N,), which carries the gradient, and den (N,); scale multiplies it."""
    num = num.double()
    if options.weights is not None:
        num = num * options.weights.double()
    factor, weight = _factors(den, options, scale)
    value = num * factor if options.reduction == "none" else num.dot(factor)
    value = value.to(dtype)
    return (value, weight) if options.return_weight else value


@torch.no_grad()
def _factors(den: Tensor, options: Reduction, scale: float) -> tuple[Tensor, Tensor]:
    """(N,) what every numerator is multiplied by, and the weight of its row; "mean" divides by their sum."""
    den = den.double()
    counts = 1.0 if options.counts is None else options.counts.double()
    if options.normalization == "batch":
        weight = den * counts
        factor = torch.ones_like(den) * counts
    elif options.normalization == "trajectory":
        weight = (den > 0) * counts * torch.ones_like(den)
        factor = 1.0 / nonzero(den)
        if options.reduction != "none":
            factor = factor * counts
    else:
        factor = counts / nonzero(group_totals(den * counts, options.group_ids))
        weight = den * factor
    if scale != 1.0:
        factor = scale * factor
    return factor / nonzero(weight.sum()) if options.reduction == "mean" else factor, weight


@torch.no_grad()
def group_mean(rows: Tensor, used: Tensor, options: Reduction) -> Tensor:
    """(N,) float64 mean of rows over the used ones of the row's group, by counts; 0 without any."""
    counts = used.double() if options.counts is None else used * options.counts.double()
    total = group_totals(torch.where(used, rows, 0).double() * counts, options.group_ids)
    return total / nonzero(group_totals(counts, options.group_ids))


def nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def group_totals(values: Tensor, group_ids: Tensor | None) -> Tensor:
    """(N,) the sum of values over the row's group, for any ids; static shapes and a fixed summation order.

    None: one group.
    """
    if group_ids is None:
        return values.sum().expand_as(values)
    ordered, order = group_ids.sort(stable=True)
    dense = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    totals = torch.zeros_like(values).index_put((dense,), values[order], accumulate=True)
    return torch.zeros_like(values).scatter(0, order, totals[dense])
