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

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn.functional import _rows
from fastgfn.functional._rows import Reduction
from fastgfn.ops import subtb as ops


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
    residual_limit: float | None = None,
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
            "shifted_cosh" e^r + e^-r - 2, "linex" e^r - r - 1, "clamped" clamp(r, -limit, limit)^2, all four
            O(T^2) time in bounded memory.
        residual_limit: of "clamped", in nats (None: 100); a residual beyond it is paid for but not corrected.
        weights, counts, group_ids, normalization, reduction, return_weight, debug: see the module.

    Returns: scalar, or (N,) for reduction "none"; with return_weight, (loss, weight (N,) float64).
    Raises: TypeError or ValueError on a dtype, shape, device or option; under debug, RuntimeError on a value.
    Numerics: float64 sums in the shift form; fp32 inputs give about 1e-7 relative error at T = 512.
    Source: Madan et al. 2023 (arXiv:2209.12782).
    """
    options = Reduction(
        "subtb_loss",
        normalization,
        reduction,
        loss,
        residual_limit,
        weights,
        counts,
        group_ids,
        return_weight,
    )
    return _explicit(options, log_pf, log_flow, lengths, log_pb, subtb_lambda, debug)


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
    residual_limit: float | None = None,
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
    name = "modified_subtb_loss"
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    return _implied(options, log_pf, log_pterm, log_reward, lengths, subtb_lambda, include_sink, debug)


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
    log_pf, log_flow = _prepared("subtb_potential", log_pf, log_flow, lengths, log_pb, debug)
    is_step, is_state = _rows.masks(lengths, log_pf.shape[1])
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
    log_pf, log_pterm = _rows.prepared(
        "termination_log_prob", log_pf, lengths, states={"log_pterm": log_pterm}
    )
    _rows.check_values("termination_log_prob", debug, lengths, log_pf=log_pf, log_pterm=log_pterm)
    is_step, is_state = _rows.masks(lengths, log_pf.shape[1])
    is_last = is_state & ~pad(is_step, (0, 1))
    total = torch.where(is_step, log_pf, 0).double().sum(1) + torch.where(is_last, log_pterm, 0).double().sum(
        1
    )
    return total.to(log_pf.dtype)


def _with_sink(log_pf: Tensor, log_flow: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append a copy of the last state to every row, reached with probability 1."""
    is_step, _ = _rows.masks(lengths, log_pf.shape[1])
    column = torch.arange(log_flow.shape[1] + 1, device=lengths.device)[None]
    log_flow = log_flow.gather(1, torch.minimum(column, lengths.long()[:, None]))
    return pad(torch.where(is_step, log_pf, 0), (0, 1)), log_flow, lengths + 1


def _prepared(
    function: str, log_pf: Tensor, log_flow: Tensor, lengths: Tensor, log_pb: Tensor | None, debug: bool
) -> tuple[Tensor, Tensor]:
    """log_pf - log_pb and log_flow, checked, in the compute dtype."""
    log_pf, log_pb, log_flow = _rows.prepared(
        function, log_pf, lengths, steps={"log_pb": log_pb}, states={"log_flow": log_flow}
    )
    net = log_pf if log_pb is None else log_pf - log_pb
    _rows.check_values(function, debug, lengths, log_pf=net, log_flow=log_flow)
    return net, log_flow


def _explicit(
    options: Reduction,
    log_pf: Tensor,
    log_flow: Tensor,
    lengths: Tensor,
    log_pb: Tensor | None,
    subtb_lambda: float,
    debug: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    log_pf, log_flow = _prepared(options.function, log_pf, log_flow, lengths, log_pb, debug)
    _rows.check_options(options, lengths)
    _rows.check_lambda(options.function, subtb_lambda)
    return _reduced(log_pf, log_flow, lengths, subtb_lambda, options)


def _implied(
    options: Reduction,
    log_pf: Tensor,
    log_pterm: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    subtb_lambda: float,
    include_sink: bool,
    debug: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    states = {"log_pterm": log_pterm, "log_reward": log_reward}
    log_pf, log_pterm, log_reward = _rows.prepared(options.function, log_pf, lengths, states=states)
    _rows.check_options(options, lengths)
    _rows.check_lambda(options.function, subtb_lambda)
    named = dict(log_pf=log_pf, log_pterm=log_pterm, log_reward=log_reward)
    _rows.check_values(options.function, debug, lengths, **named)
    log_flow = log_reward - log_pterm
    if include_sink:
        log_pf, log_flow, lengths = _with_sink(log_pf, log_flow, lengths)
    return _reduced(log_pf, log_flow, lengths, subtb_lambda, options)


def _reduced(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float, options: Reduction
) -> Tensor | tuple[Tensor, Tensor]:
    if options.loss in ("squared", "half_squared"):
        num, den = ops.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
        scale = 0.5 if options.loss == "half_squared" else 1.0
        return _rows.reduced(num, den, options, log_pf.dtype, scale=scale)
    num, den = ops.subtb_pairwise(
        log_pf, log_flow, lengths, subtb_lambda, options.loss, options.residual_limit
    )
    return _rows.reduced(num, den, options, log_pf.dtype)
