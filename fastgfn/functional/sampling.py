"""`sample_next` and `sample_next_from_hidden`: the next token, with the log-probs that a GFlowNet needs."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional import values
from fastgfn.functional.log_probs import DTYPES, check_dtype, check_head
from fastgfn.ops.sample_next import gumbel_draw, head_gumbel_draw

UNFILTERED = (None, None, None)  # top_k, top_p, min_p


@dataclass(frozen=True, slots=True)
class Draw:
    """K drawn tokens, each field (K,): token int64; log-probs (nats) float32, or float64 for such logits."""

    token: Tensor
    log_pf: Tensor
    log_pterm: Tensor
    log_behavior: Tensor


@torch.no_grad()
def sample_next(
    logits: Tensor,  # (R, V) float16 | bfloat16 | float32 | float64; a copy unless rows are contiguous
    *,
    temperature: float | Tensor = 1.0,  # scalar or (K,)
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    logit_bias: Tensor | None = None,  # (V,)
    termination_token_id: int | None = None,
    forbid_termination: Tensor | None = None,  # (K,) bool
    force_termination: Tensor | None = None,  # (K,) bool
    seed: int,
    trajectory: Tensor | None = None,  # (K,) int64
    position: Tensor | None = None,  # (K,) int64
    rows: Tensor | None = None,  # (K,) int64
) -> Draw:
    """Draw K tokens from softmax((logits + logit_bias) / temperature), exactly.

    Equal to argmax_v (logits[rows] + logit_bias)[v] / temperature + Gumbel noise, where the noise depends on
    (seed, trajectory, position, v) alone: the batch that a draw is computed in does not matter.

    Args:
        temperature: divides the logits of the draw, not those of log_pf and log_pterm; > 0, no unit.
        top_k, top_p, min_p: draw from the top_k likeliest tokens, of them from the fewest that hold top_p of
            their mass, of them from those of at least min_p times the largest probability, all at the
            temperature. Such a behaviour lacks support: no weight corrects for what it never draws.
        logit_bias: added to the logits first, e.g. a vocabulary mask; part of the policy.
        termination_token_id: the token that stops; None: no token does, and log_pterm is -inf.
        forbid_termination: draws that cannot stop; the other tokens are renormalised, log_pterm is -inf.
        force_termination: draws that must stop (wins over forbid_termination); all three log-probs are 0.
        seed: key of the noise, a 64-bit integer; fixed in a CUDA graph.
        trajectory, position: the trajectory that the draw extends, default 0..K-1, and its step, default 0.
        rows: the row of logits that each draw reads, default 0..R-1 (then K == R).

    Returns:
        A Draw: token, log_pf = log q(token) and log_pterm = log q(stop) at temperature 1 and unfiltered,
        log_behavior = log-prob of the token under the distribution that drew it. Not differentiable.

    Raises:
        InputError: a shape, device, filter, id or seed, forbid or force without termination_token_id; a row,
            position or temperature out of range, logits with nan or inf, no token left. On CUDA these draws
            are token -1 with NaN log-probs, forced or not, and raise only with FASTGFN_DEBUG=1, which waits
            for the GPU. InputTypeError: a dtype, float64 on CUDA.

    Numerics: the same bits whatever the batch, row order or threads. On CPU exp in the dtype of the logits,
        sums and logs in float64; extra memory V float32 values per distinct (row, temperature). On CUDA
        float32, a score off by at most 2e-6 + 2^-23 |logit / temperature|, no host synchronisation.
    Source: Gumbel-max trick; noise of Salmon et al. 2011 (Philox4x32-10).
    """
    name = "sample_next"
    _check_logits(name, logits, top_k, top_p, min_p)
    rows, draws, stop, forbid = _per_draw(
        name, logits, logits.shape[1], rows, temperature, trajectory, position, termination_token_id,
        forbid_termination, force_termination, logit_bias,
    )  # fmt: skip
    filters = (top_k, top_p, min_p)
    biased = _biased(logits, logit_bias, filters)
    draw = _draw(biased, rows, *draws, _int_seed(name, seed), stop, forbid, filters)
    return _forced(name, draw, force_termination, stop)


@torch.no_grad()
def sample_next_from_hidden(
    hidden: Tensor,  # (R, D) floating point, any strides
    weight: Tensor,  # (V, D) same dtype
    *,
    bias: Tensor | None = None,  # (V,) same dtype
    logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float | Tensor = 1.0,  # scalar or (K,)
    termination_token_id: int | None = None,
    forbid_termination: Tensor | None = None,  # (K,) bool
    force_termination: Tensor | None = None,  # (K,) bool
    seed: int | Tensor,  # () or (1,) int64
    trajectory: Tensor | None = None,  # (K,) int64
    position: Tensor | None = None,  # (K,) int64
    rows: Tensor | None = None,  # (K,) int64
) -> Draw:
    """`sample_next` of the logits of a head, which are not returned and on CUDA never exist.

    Equal to sample_next(x) with, in this order, x = logit_scale * (hidden @ weight.T + bias) and
    x = c * tanh(x / c) for the softcap c.

    Args:
        hidden: final hidden states; several draws may read one row.
        weight, bias: the head. logit_scale has no unit, the softcap is in logits.
        seed: key of the noise. A tensor on the device of `hidden` is read when the draw runs, so that a CUDA
            graph draws anew with each value put there, as with trajectory and position.
        Others: as in `sample_next`.

    Returns:
        A Draw with float32 log-probs. Not differentiable.

    Raises:
        As `sample_next`; float64 is for CPU only. NotImplementedError: the weight is quantised or wrapped.

    Numerics: on CPU the logits are rounded to the dtype of `hidden`, at most 64 MiB of them (or one row) at a
        time, and the bits are those of `sample_next`. On CUDA they are float32 sums (float32 input: as three
        tf32 products, about float32); one read of the weight per 64 draws, O(K) memory, no host
        synchronisation, the same bits on repeat; another number of draws may round the logits otherwise.
    """
    name = "sample_next_from_hidden"
    _check_linear(name, hidden, weight, bias)
    checks.check(math.isfinite(logit_scale), name, "logit_scale", "finite", logit_scale, "pass the model's")
    cap = final_logit_softcap
    checks.check(cap is None or cap > 0, name, "final_logit_softcap", "> 0 or None", cap, "pass the model's")
    rows, draws, stop, forbid = _per_draw(
        name, hidden, weight.shape[0], rows, temperature, trajectory, position, termination_token_id,
        forbid_termination, force_termination, logit_bias,
    )  # fmt: skip
    draw = _checked(
        head_gumbel_draw, hidden, weight, bias, logit_bias, logit_scale, cap, rows, *draws,
        _tensor_seed(name, seed, hidden.device), stop, forbid,
    )  # fmt: skip
    return _forced(name, draw, force_termination, stop)


def _checked(op, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        return op(*arguments)
    except ValueError as error:
        raise checks.InputError(str(error)) from None


def _forced(name: str, draw: tuple[Tensor, ...], force: Tensor | None, stop: int) -> Draw:
    token, *log_probs = draw
    if values.is_debug():
        bad = (token < 0).nonzero()[:1, 0].tolist()
        want, fix = "free of nan and inf, with a token left to draw", "correct the row of that draw"
        checks.check(not bad, name, "logits", want, f"none at draw {bad}", fix)
    if force is None:
        return Draw(*draw)
    # A draw that CUDA marked stays marked.
    force = force & (token >= 0)
    return Draw(token.masked_fill(force, stop), *(x.masked_fill(force, 0.0) for x in log_probs))


def _draw(
    logits, rows, temperature, trajectory, position, seed, stop, forbid, filters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if filters == UNFILTERED:
        return _checked(gumbel_draw, logits, rows, temperature, trajectory, position, seed, stop, forbid)
    rows, bad_rows = values.clamped(rows, logits.shape[0])
    z = logits[rows]
    if stop >= 0:
        z[:, stop] = z[:, stop].masked_fill(forbid, -torch.inf)
    left = kept(z / temperature[:, None].to(z.dtype), *filters)
    own_row = torch.arange(len(rows), device=rows.device)
    if bad_rows is not None:
        own_row = own_row.masked_fill(bad_rows, -1)
    token, _, _, log_behavior = _checked(
        gumbel_draw, z.masked_fill(~left, -torch.inf), own_row, temperature, trajectory, position, seed, stop,
        forbid,
    )  # fmt: skip
    log_q = z.log_softmax(1)
    log_pf = log_q.gather(1, token.clamp(min=0)[:, None])[:, 0]
    log_pterm = log_q[:, stop] if stop >= 0 else torch.full_like(log_pf, -torch.inf)
    # CUDA marks a draw without a token by -1
    return token, *(values.marked(x, token < 0) for x in (log_pf, log_pterm, log_behavior))


def kept(z: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """(K, V) bool: the tokens that the filters leave of softmax(z); the likeliest always stays."""
    z, order = z.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(z.shape[1], device=z.device)
    kept = (rank < (z.shape[1] if top_k is None else top_k)).expand(z.shape)
    p = z.masked_fill(~kept, -torch.inf).softmax(1)
    if top_p is not None:
        kept = kept & ((p.cumsum(1) - p < top_p) | (rank == 0))
    if min_p is not None:
        kept = kept & (p >= min_p * p[:, :1])
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _check_logits(
    name: str, logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    checks.check_shape(name, "logits", logits, ("R", "V"), "flatten the leading dimensions")
    _check_known(name, "logits", logits)
    fix = "pass None to leave it out"
    checks.check(top_k is None or top_k >= 1, name, "top_k", ">= 1 or None", top_k, fix)
    checks.check(top_p is None or 0 < top_p <= 1, name, "top_p", "in (0, 1] or None", top_p, fix)
    checks.check(min_p is None or 0 <= min_p <= 1, name, "min_p", "in [0, 1] or None", min_p, fix)


def _check_linear(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.check_shape(name, "hidden", hidden, ("R", "D"), "flatten the leading dimensions")
    _check_known(name, "hidden", hidden)
    check_head(name, weight, "sample_next")
    checks.check_shape(name, "weight", weight, ("V", hidden.shape[1]), "pass the head of the same model")
    check_dtype(name, "weight", weight, hidden.dtype, "hidden")
    if bias is not None:
        checks.check_shape(name, "bias", bias, (weight.shape[0],), "pass the bias of the same head")
        check_dtype(name, "bias", bias, hidden.dtype, "hidden")
    checks.check_same_device(name, hidden=hidden, weight=weight, bias=bias)


def _check_known(name: str, arg: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        want = "float16, bfloat16, float32 or float64"
        checks.fail(name, arg, want, tensor.dtype, "cast it", kind=checks.InputTypeError)


def _int_seed(name: str, seed: int) -> int:
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        checks.fail(name, "seed", "an int", type(seed).__name__, "pass one", kind=checks.InputTypeError)
    checks.check(-(2**63) <= seed < 2**63, name, "seed", "in [-2^63, 2^63)", seed, "pass a smaller one")
    return int(seed)


def _tensor_seed(name: str, seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((1,), _int_seed(name, seed), dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        fix = "cast it to int64"
        checks.fail(name, "seed", "an int or an int64 tensor", seed.dtype, fix, kind=checks.InputTypeError)
    have, fix = tuple(seed.shape), "pass one number for all draws"
    checks.check(have in ((), (1,)), name, "seed", "() or (1,)", have, fix)
    checks.check(
        seed.device == device, name, "seed", f"on {device}", seed.device, "move it there, or pass an int"
    )
    return seed.reshape(1)


def _biased(logits: Tensor, logit_bias: Tensor | None, filters: tuple) -> Tensor:
    """logits + logit_bias with contiguous rows, in float32 or float64, or as CUDA can read them."""
    is_read = filters == UNFILTERED and logit_bias is None and logits.is_cuda
    if not is_read and logits.element_size() == 2:
        logits = logits.float()
    if logit_bias is not None:
        logits = logits + logit_bias.to(logits.dtype)
    if logits.stride(1) != 1:
        logits = logits.clone(memory_format=torch.contiguous_format)
    return logits


def _per_draw(
    name, source, vocab, rows, temperature, trajectory, position, stop_id, forbid, force, logit_bias
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], int, Tensor]:
    """rows, (temperature, trajectory, position), stop and forbid_stop of K draws, checked and filled in."""
    device = source.device
    if rows is not None:
        checks.check_shape(name, "rows", rows, ("K",), "give one row number per draw")
    num_draws = source.shape[0] if rows is None else rows.shape[0]
    if logit_bias is not None:
        checks.check_shape(name, "logit_bias", logit_bias, (vocab,), "give one value per token")
    _check_stop(name, num_draws, vocab, stop_id, forbid, force)
    temperature = _temperature(name, temperature, num_draws, device)
    for arg, value in (("rows", rows), ("trajectory", trajectory), ("position", position)):
        if value is not None:
            checks.check_shape(name, arg, value, (num_draws,), "give one value per draw")
            if value.dtype != torch.int64:
                checks.fail(name, arg, "int64", value.dtype, "cast it", kind=checks.InputTypeError)
    for arg, value, high in (("rows", rows, source.shape[0]), ("position", position, 2**32)):
        if value is not None:
            values.check_range(name, arg, value, high)
    given = {"temperature": temperature, "trajectory": trajectory, "position": position, "rows": rows}
    given |= {"forbid_termination": forbid, "force_termination": force, "logit_bias": logit_bias}
    checks.check_same_device(name, **{"the logits or hidden": source}, **given)
    index = torch.arange(num_draws, device=device)
    rows = index if rows is None else rows
    trajectory = index if trajectory is None else trajectory
    position = torch.zeros_like(index) if position is None else position
    forbid = torch.zeros_like(index, dtype=torch.bool) if forbid is None else forbid
    if force is not None:
        forbid = forbid & ~force
    stop = -1 if stop_id is None else stop_id
    return rows, (temperature, trajectory, position), stop, forbid


def _temperature(name: str, temperature: float | Tensor, num_draws: int, device: torch.device) -> Tensor:
    """(K,) float32."""
    if not isinstance(temperature, Tensor):
        read = torch.tensor([temperature], dtype=torch.float32)
        temperature = torch.full((num_draws,), temperature, dtype=torch.float32, device=device)
    else:
        temperature = temperature.to(torch.float32)
        if temperature.dim() == 0:
            temperature = temperature.expand(num_draws)
        checks.check_shape(name, "temperature", temperature, (num_draws,), "give one value per draw")
        read = temperature if values.are_read(temperature) else None
    if read is not None:
        bad = read[~((read > 0) & read.isfinite())][:1].tolist()
        want, fix = "finite and > 0", "use argmax for greedy decoding"
        checks.check(not bad, name, "temperature", want, bad, fix)
    return temperature


def _check_stop(name, num_draws, vocab, termination_token_id, forbid, force) -> None:
    checks.check(
        termination_token_id is None or 0 <= termination_token_id < vocab,
        name,
        "termination_token_id",
        f"in [0, {vocab})",
        termination_token_id,
        "pass an id of the vocabulary",
    )
    for arg, mask in (("forbid_termination", forbid), ("force_termination", force)):
        if mask is None:
            continue
        checks.check_shape(name, arg, mask, (num_draws,), "give one value per draw")
        if mask.dtype != torch.bool:
            checks.fail(name, arg, "bool", mask.dtype, "cast it", kind=checks.InputTypeError)
        checks.check(
            termination_token_id is not None,
            name,
            "termination_token_id",
            f"given with {arg}",
            None,
            "pass the id of the token that stops",
        )
