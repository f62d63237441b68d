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

from fastgfn.functional import _rows, _states
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
    Fixed point: flows and policy consistent with R, which is R's posterior where the batch covers the states.
    Choose it where the states have flows of their own (a learned head).
    What differs: windows are pooled over the batch; normalization "trajectory" is the paper's.
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
    terminable: Tensor | None = None,  # (N, T + 1) bool
    log_z: Tensor | None = None,  # () | (N,) floating point
    include_sink: bool = False,
    return_weight: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subtb_loss` where states may stop: log_flow = log_reward - log_pterm.

    Fixed point: q(x) proportional to R(x), R's posterior where the batch covers the strings. Choose it where
    every prefix has an informative reward; with a sparse one the windows pull the stop probabilities away
    (then `rooted_prefix_tb_loss` or `vargrad_loss`).

    Args:
        log_pf: log q(token t+1 | state t), before the termination token.
        log_pterm: log q(stop | state t), the column lengths[n] included.
        log_reward: log R(state t, then stop), already tempered.
        terminable: which states may stop; None: all. The others leave the windows (their log_pterm and
            log_reward are not read), and where s_0 is one, U_0 = -log_z takes its place (the anchor).
        log_z: of the anchor, for all rows or per row; gets a gradient. None: the detached mean of
            log R(x) - log q(x) over the row's group_ids (None: over the batch).
        include_sink: also count the state after the termination, a copy of the last state: a row then has
            (n+1)(n+2)/2 windows, also for n = 0 (the second mask convention of the published code).
        The others: as `subtb_loss`.

    Returns, raises, numerics: as `subtb_loss`. log_reward gets a gradient only if it requires one.
    What differs: prefixes that may not stop leave the windows; the anchor.
    Source: Hu et al. 2024 (arXiv:2310.04363).
    """
    name = "modified_subtb_loss"
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    states = log_pf, log_pterm, log_reward, lengths, terminable, log_z
    return implied(options, *states, subtb_lambda, include_sink, debug)


def detailed_balance_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_flow: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
    log_pb: Tensor | None = None,  # (N, T)
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
    """Mean of (log_flow[t] + log_pf[t] - log_pb[t] - log_flow[t+1])^2 over transitions.

    `subtb_loss` with subtb_lambda 0, and its fixed point. Choose it where single transitions are drawn or
    stored; the reward reaches s_0 only through the flows between.
    What differs: nothing but that the mean is over the transitions of all rows together.
    Source: Bengio et al. 2023 (arXiv:2111.09266).

    Args, returns, raises, numerics: as `subtb_loss`.
    """
    name = "detailed_balance_loss"
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    return _explicit(options, log_pf, log_flow, lengths, log_pb, 0.0, debug)


def modified_detailed_balance_loss(
    log_pf: Tensor,  # (N, T) floating point
    log_pterm: Tensor,  # (N, T + 1) floating point
    log_reward: Tensor,  # (N, T + 1) floating point
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    *,
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
    """Mean of (U_{t+1} - U_t)^2 over transitions, U_t = log q(s_t, then stop) - log R(s_t, then stop).

    `modified_subtb_loss` with subtb_lambda 0, and its fixed point: R's posterior. Choose it where every
    prefix has a reward and gradients of low variance matter more than quick credit from end to start.
    What differs: states that may not stop are skipped, as in `modified_subtb_loss`.
    Source: Deleu et al. 2022 (arXiv:2202.13903).

    Args, returns, raises, numerics: as `modified_subtb_loss`.
    """
    name = "modified_detailed_balance_loss"
    options = Reduction(
        name, normalization, reduction, loss, residual_limit, weights, counts, group_ids, return_weight
    )
    states = log_pf, log_pterm, log_reward, lengths, terminable, log_z
    return implied(options, *states, 0.0, False, debug)


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
    _, is_state = _rows.masks(lengths, log_pf.shape[1])
    return torch.where(is_state, log_flow.double() - _states.paths(log_pf, lengths), 0).to(log_flow.dtype)


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
    total = _states.last(_states.paths(log_pf, lengths), lengths) + _states.last(log_pterm, lengths).double()
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


def implied(
    options: Reduction,
    log_pf: Tensor,
    log_pterm: Tensor,
    log_reward: Tensor,
    lengths: Tensor,
    terminable: Tensor | None,
    log_z: Tensor | None,
    subtb_lambda: float,
    include_sink: bool,
    debug: bool,
    segment: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The losses whose flows are log_reward - log_pterm; segment: `interpolated_log_reward` first."""
    states = {"log_pterm": log_pterm, "log_reward": log_reward}
    log_pf, log_pterm, log_reward = _rows.prepared(options.function, log_pf, lengths, states=states)
    _states.check_anchor(options.function, log_reward, terminable, log_z)
    _rows.check_options(options, lengths, grouped=terminable is not None and log_z is None)
    _rows.check_log_z(options.function, lengths, log_z)
    _rows.check_lambda(options.function, subtb_lambda)
    if segment is not None:
        log_reward = _states.interpolated(log_reward, lengths, segment, terminable)
    if terminable is not None:
        log_pterm, log_reward = (torch.where(terminable, x, 0) for x in (log_pterm, log_reward))
    named = dict(log_pf=log_pf, log_pterm=log_pterm, log_reward=log_reward, log_z=log_z)
    _rows.check_values(options.function, debug, lengths, **named)
    log_flow = log_reward - log_pterm
    if terminable is not None:
        bad = _rows.out_of_range(options.function, lengths, log_pf.shape[1])
        log_z = _states.anchor(log_pf, log_flow, lengths, terminable, options) if log_z is None else log_z
        log_pf, log_flow, lengths = _states.compacted(log_pf, log_flow, lengths, terminable, log_z)
        lengths = lengths.masked_fill(bad, -2)
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
