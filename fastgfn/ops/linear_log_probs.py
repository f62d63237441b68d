"""Log-probabilities of the head without the (R, V) logits: the dispatcher op `fastgfn::linear_log_probs` and
its two backward ops. Equations: `reference/linear_log_probs.py`. Providers: `ops/head.py`; the one below, in
torch, is "tiles", the only one on the CPU.

The vocabulary is cut into tiles and is the outer loop: the weight is read once per pass, a tile of logits
stays in cache, and the weight gradient of a tile is written once. The columns to read are a sorted list of
distinct (column, row) entries, so those of a tile are one range and every gradient sum has a fixed order.
On a CPU with AVX-512 the bfloat16 forward is one C++ pass (csrc/head.cpp): torch can multiply bfloat16 only
into bfloat16, whose rounding log-probs would show. Elsewhere it is torch in float32, tile by tile.
"""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn.ops import head
from fastgfn.ops.linear import product

# Logits of one tile are (R, VOCAB_TILE); wider tiles leave the cache and were slower at every R.
VOCAB_TILE = 512


def linear_log_probs(
    hidden: Tensor,  # (R, D) floating point, any strides
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor,  # (M,) int32 | int64
    rows: Tensor,  # (M,) int32 | int64
    *,
    termination_token_id: int | None,
    bias: Tensor | None,
    logit_bias: Tensor | None,  # (V,), or (2, V) with num_policy
    logit_scale: float,
    final_logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    provider: str | None = None,
    num_policy: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_pf (M,), log_pterm (R,) or None, lse (R,); see `functional.log_probs.linear_log_probs`.

    provider: one of `head.PROVIDERS`; None follows the table there.
    num_policy: rows from there on take the second logit_bias and get no gradient (their outputs must not be
        used for one); None: all rows are alike.

    The distinct entries are counted on the host (one synchronisation on CUDA).
    """
    num_rows, num_targets = hidden.shape[0], targets.shape[0]
    ignored = targets == ignore_index
    # An ignored target reads column 0: it gets no gradient, and S may hold a column too many.
    keys = targets.masked_fill(ignored, 0).long() * num_rows + rows
    if termination_token_id is not None:
        row_ids = torch.arange(num_rows, device=keys.device)
        keys = torch.cat([keys, termination_token_id * num_rows + row_ids])
    entries, slot = keys.unique(return_inverse=True)
    is_frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or not is_frozen)
    provider = head.choose_provider(
        "linear_log_probs" if num_policy is None else "policy_reward_log_probs",
        provider,
        hidden,
        wants_grad=wants_grad,
        saves_grad=wants_grad and is_frozen,
    )
    log_p, lse, *_ = torch.ops.fastgfn.linear_log_probs(
        hidden,
        weight,
        bias,
        logit_bias,
        entries % max(num_rows, 1),
        entries // max(num_rows, 1),
        logit_scale,
        final_logit_softcap,
        temperature,
        wants_grad and is_frozen,
        provider,
        num_policy,
    )
    log_p = log_p.index_select(0, slot)
    log_pf = log_p[:num_targets].masked_fill(ignored, 0.0)
    return log_pf, None if termination_token_id is None else log_p[num_targets:], lse


def policy_reward_log_probs(
    policy_hidden: Tensor,  # (R1, D)
    reward_hidden: Tensor,  # (R2, D)
    weight: Tensor,
    targets: tuple[Tensor, Tensor],  # (M1,), (M2,)
    rows: tuple[Tensor, Tensor],  # (M1,) in [0, R1), (M2,) in [0, R2)
    *,
    policy_logit_bias: Tensor | None,
    reward_logit_bias: Tensor | None,
    **options,  # of linear_log_probs
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """`linear_log_probs` of both streams in one pass over the head; the second without gradient."""
    num_policy, num_targets = policy_hidden.shape[0], targets[0].shape[0]
    biases = (policy_logit_bias, reward_logit_bias)
    given = [b for b in biases if b is not None]
    log_pf, log_pterm, lse = linear_log_probs(
        torch.cat([policy_hidden, reward_hidden.detach()]),
        weight,
        torch.cat(targets),
        torch.cat([rows[0], rows[1] + num_policy]),
        logit_bias=torch.stack([torch.zeros_like(given[0]) if b is None else b for b in biases])
        if given
        else None,
        num_policy=num_policy,
        **options,
    )
    stops = (None, None)
    if log_pterm is not None:
        stops = (log_pterm[:num_policy], log_pterm[num_policy:].detach())
    policy = (log_pf[:num_targets], stops[0], lse[:num_policy])
    return [policy, (log_pf[num_targets:].detach(), stops[1], lse[num_policy:].detach())]


@torch.library.custom_op("fastgfn::linear_log_probs", mutates_args=())
def _linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,  # (V,) or (2, V)
    rows: Tensor,  # (E,) int64
    columns: Tensor,  # (E,) int64; (column, row) sorted and distinct
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    save_row_grad: bool,
    provider: str = "tiles",
    num_policy: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p (E,), lse (R,), softcap' (E,), the parts of lse (2, R): maximum and rest, o or (0,).

    o is (R, D), or (num_policy, D).
    """
    num_rows, width = hidden.shape
    graded = num_rows if num_policy is None else num_policy
    if provider != "tiles":
        scales = (logit_scale, softcap, temperature)
        return head.forward(
            provider, hidden, weight, bias, logit_bias, rows, columns, scales, save_row_grad, graded
        )
    if graded == num_rows and uses_csrc(hidden, weight):
        # without reward rows the second mask serves none
        mask = logit_bias[0] if logit_bias is not None and logit_bias.dim() == 2 else logit_bias
        return _by_csrc(
            hidden, weight, bias, mask, rows, columns, logit_scale, softcap, temperature, save_row_grad
        )
    x = _scaled_hidden(hidden, logit_scale, softcap, temperature)
    # Finite, so that a tile of -inf logits adds exp(-inf - peak) = 0 instead of exp(nan).
    peak = x.new_full((num_rows, 1), torch.finfo(x.dtype).min)
    total = x.new_zeros(num_rows, 1)
    row_grad = x.new_zeros((graded, width) if save_row_grad else (0,))
    logits, slope = x.new_empty(rows.shape), x.new_ones(rows.shape)
    for span, own in _tiles(columns, weight.shape[0]):
        w = weight[span]
        z, s = _tile_logits(x, w, bias, logit_bias, span, logit_scale, softcap, temperature, graded)
        at = (rows[own], columns[own] - span.start)
        logits[own] = z[at]
        if s is not None:
            slope[own] = s[at]
        old, peak = peak, torch.maximum(peak, z.amax(1, keepdim=True))
        shrink = (old - peak).exp_()
        z.sub_(peak).exp_()
        total.mul_(shrink).add_(z.sum(1, keepdim=True))
        if save_row_grad:
            z[at] = 0.0
            if s is not None:
                z.mul_(s)
            row_grad.mul_(shrink[:graded]).add_(product(z[:graded].to(w.dtype), w.T))
    log_total = total.log()
    log_p = (logits - peak[rows, 0]) - log_total[rows, 0]
    if save_row_grad:
        row_grad.div_(total[:graded])
    lse_parts = torch.cat([peak, log_total], dim=1).T.contiguous()
    return log_p, lse_parts.sum(0), slope, lse_parts, row_grad


@torch.library.custom_op("fastgfn::linear_log_probs_frozen_backward", mutates_args=())
def _frozen_backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    row_grad: Tensor,
    factor: float,
) -> Tensor:
    """d hidden (R, D) in the dtype of `weight`, from the saved o: no product over the vocabulary.

    Rows that o lacks have no upstream gradient.
    """
    rest, at_entries = _logit_grads(grad_log_p, grad_lse, rows, log_p, slope)
    graded, num_rows = row_grad.shape[0], rest.shape[0]
    grad = row_grad * rest[:graded, None]
    if graded < num_rows:
        grad = torch.nn.functional.pad(grad, (0, 0, 0, num_rows - graded))
    grad.index_add_(0, rows, at_entries[:, None] * weight[columns].to(grad.dtype))
    return grad.mul_(factor).to(weight.dtype)


@torch.library.custom_op("fastgfn::linear_log_probs_backward", mutates_args=())
def _backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    lse_parts: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    num_policy: int | None,
    needs: list[bool],  # d hidden, d weight, d bias
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden (R, D), d weight (V, D), d bias (V,), each (0,) if not needed; the logits are recomputed."""
    x = _scaled_hidden(hidden, logit_scale, softcap, temperature)
    rest, at_entries = _logit_grads(grad_log_p, grad_lse, rows, log_p, slope)
    factor = logit_scale / temperature
    peak, log_total = lse_parts[:, :, None]
    need_hidden, need_weight, need_bias = needs
    graded = x.shape[0] if num_policy is None else num_policy
    grad_hidden = x.new_zeros(hidden.shape if need_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_empty(weight.shape[:1] if need_bias else (0,))
    for span, own in _tiles(columns, weight.shape[0]):
        w = weight[span]
        z, s = _tile_logits(x, w, bias, logit_bias, span, logit_scale, softcap, temperature, graded)
        z.sub_(peak).sub_(log_total).exp_().mul_(rest[:, None])
        if s is not None:
            z.mul_(s)
        z[rows[own], columns[own] - span.start] = at_entries[own]
        z.mul_(factor)
        if need_hidden:
            grad_hidden.add_(product(z.to(w.dtype), w.T))
        if need_weight:
            grad_weight[span] = product(z.to(w.dtype).T, hidden.T)
        if need_bias:
            grad_bias[span] = z.sum(0)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def uses_csrc(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the C++ pass serves a head: bfloat16 rows of even width on a CPU with AVX-512."""
    return (
        hidden.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hidden.dtype == weight.dtype == torch.bfloat16
        and hidden.numel() > 0  # an empty tensor counts as contiguous, whatever its strides are
        and hidden.shape[1] % 2 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 2 == 0
        and weight.data_ptr() % 4 == 0
    )


def _by_csrc(
    hidden, weight, bias, logit_bias, rows, columns, logit_scale, softcap, temperature, save_row_grad
):
    scale = logit_scale / (temperature if softcap is None else softcap)
    logits, slope, peak, total, row_grad = torch.ops.fastgfn.head_forward(
        hidden.contiguous(),
        weight,
        None if bias is None else bias.float() * scale,
        None if logit_bias is None else logit_bias.float() / temperature,
        rows,
        columns,
        scale,
        0.0 if softcap is None else softcap / temperature,
        save_row_grad,
    )
    log_total = total.log().float()
    log_p = (logits - peak[rows]) - log_total[rows]
    if save_row_grad:
        row_grad.div_(total[:, None].float())
    lse_parts = torch.stack([peak, log_total])
    return log_p, lse_parts.sum(0), slope, lse_parts, row_grad


def _scaled_hidden(hidden: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.to(dtype) * (logit_scale / (temperature if softcap is None else softcap))


def _tiles(columns: Tensor, vocab: int) -> list[tuple[slice, slice]]:
    """Column range and entry range of every tile."""
    starts = list(range(0, vocab, VOCAB_TILE)) + [vocab]
    cuts = torch.searchsorted(columns, torch.tensor(starts, device=columns.device)).tolist()
    return [
        (slice(a, b), slice(i, j))
        for a, b, i, j in zip(starts[:-1], starts[1:], cuts[:-1], cuts[1:], strict=True)
    ]


def _tile_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    span: slice,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    num_policy: int,
) -> tuple[Tensor, Tensor | None]:
    """Logits of a tile and, with a softcap, its derivative; x is already scaled by `_scaled_hidden`."""
    z = product(x, weight.to(x.dtype))
    slope = None
    if bias is not None:
        z.add_(bias[span].to(x.dtype), alpha=logit_scale / (temperature if softcap is None else softcap))
    if softcap is not None:
        z.tanh_()
        slope = 1.0 - z * z
        z.mul_(softcap / temperature)
    if logit_bias is not None and logit_bias.dim() == 1:
        z.add_(logit_bias[span].to(x.dtype), alpha=1.0 / temperature)
    elif logit_bias is not None:
        for part, mask in zip((z[:num_policy], z[num_policy:]), logit_bias[:, span], strict=True):
            part.add_(mask.to(x.dtype), alpha=1.0 / temperature)
    return z, slope


def _logit_grads(
    grad_log_p: Tensor, grad_lse: Tensor, rows: Tensor, log_p: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """-(G - l) of every row, and temperature * dL/dx of every entry."""
    total = torch.zeros_like(grad_lse).index_add_(0, rows, grad_log_p)
    others = total[rows] - grad_log_p - grad_lse[rows]
    at_entries = (grad_log_p * -torch.expm1(log_p) - log_p.exp() * others) * slope
    return grad_lse - total, at_entries


@torch.library.register_fake("fastgfn::head_forward")
def _(hidden, weight, bias, logit_bias, rows, columns, scale, softcap, want_grad):
    def floats(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    entries, num_rows = rows.shape[0], hidden.shape[0]
    row_grad = floats(*hidden.shape) if want_grad else floats(0)
    total = hidden.new_empty(num_rows, dtype=torch.float64)
    return floats(entries), floats(entries), floats(num_rows), total, row_grad


@_linear_log_probs.register_fake
def _(
    hidden, weight, bias, logit_bias, rows, columns, logit_scale, softcap, temperature, save_row_grad,
    provider="tiles", num_policy=None,
):  # fmt: skip
    (num_rows, width), num_entries = hidden.shape, rows.shape[0]
    row_grad = (num_rows if num_policy is None else num_policy, width) if save_row_grad else (0,)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shapes = ((num_entries,), (num_rows,), (num_entries,), (2, num_rows), row_grad)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@_frozen_backward.register_fake
def _(grad_log_p, grad_lse, weight, rows, columns, log_p, slope, row_grad, factor):
    return weight.new_empty(grad_lse.shape[0], weight.shape[1])


@_backward.register_fake
def _(
    grad_log_p, grad_lse, hidden, weight, bias, logit_bias, rows, columns, log_p, slope,
    lse_parts, logit_scale, softcap, temperature, num_policy, needs,
):  # fmt: skip
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx, inputs, output):
    hidden, weight, bias, logit_bias, rows, columns, *ctx.scales, ctx.has_row_grad, _, ctx.num_policy = inputs
    log_p, _, slope, lse_parts, row_grad = output
    ctx.mark_non_differentiable(slope, lse_parts, row_grad)
    if ctx.has_row_grad:
        ctx.save_for_backward(weight, rows, columns, log_p, slope, row_grad)
    else:
        ctx.save_for_backward(hidden, weight, bias, logit_bias, rows, columns, log_p, slope, lse_parts)


def _gradient(ctx, grad_log_p, grad_lse, *unused):
    if ctx.has_row_grad:
        factor = ctx.scales[0] / ctx.scales[2]
        grad = torch.ops.fastgfn.linear_log_probs_frozen_backward(
            grad_log_p, grad_lse, *ctx.saved_tensors, factor
        )
        return grad, *[None] * 11
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastgfn.linear_log_probs_backward(
        grad_log_p, grad_lse, *ctx.saved_tensors, *ctx.scales, ctx.num_policy, needs
    )
    return *[g if need else None for g, need in zip(grads, needs, strict=True)], *[None] * 9


torch.library.register_autograd("fastgfn::linear_log_probs", _gradient, setup_context=_save)
