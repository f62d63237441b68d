"""The "tiles" provider of `fastgfn::linear_log_probs`, in torch: any device and dtype, alone on the CPU.

The vocabulary is cut into tiles and is the outer loop: the weight is read once per pass, a tile of logits
stays in cache, and the weight gradient of a tile is written once. Entries are sorted by column, so those of a
tile are one range. Equations: `reference/linear_log_probs.py`. On CPU the bfloat16 forward is one C++ pass
where that runs (`ops/head_csrc.py`); elsewhere, and with masks of rows, torch in float32.
"""

import torch
from torch import Tensor

from fastgfn.ops.head_csrc import rest_by_csrc, uses_csrc
from fastgfn.ops.head_masks import Masks, forbid_, forbidden_entries
from fastgfn.ops.linear import product

# Logits of one tile are (R, VOCAB_TILE); wider tiles leave the cache and were slower at every R.
VOCAB_TILE = 512
# Entries whose rows of the weight are in memory at once.
ENTRY_TILE = 512
# Logit scale, softcap, temperature.
Scales = tuple[float, float | None, float]


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    scales: Scales,
    save_row_grad: bool,
    graded: int,
    masks: Masks = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `fastgfn::linear_log_probs`; rows below `graded` get an o."""
    args = (hidden, weight, bias, logit_bias, rows, columns, scales, save_row_grad, graded)
    is_csrc = masks is None and uses_csrc(hidden, weight)
    return _with_entries(rows, *(rest_by_csrc(*args) if is_csrc else rest_by_tiles(*args, masks)))


def rest_by_tiles(
    hidden, weight, bias, logit_bias, rows, columns, scales, save_row_grad, graded, masks=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entries' logits and softcap' (E,); of all other columns, the maximum m (R,), the sum of exp(z - m) (R,)
    and, per graded row, the sum of exp(z - m) softcap' W (graded, D) or (0,)."""
    x = _scaled_hidden(hidden, scales)
    # Finite, so that a tile of -inf logits adds exp(-inf - peak) = 0 instead of exp(nan).
    peak = x.new_full((x.shape[0], 1), torch.finfo(x.dtype).min)
    total = x.new_zeros((x.shape[0], 1), dtype=torch.float64)
    row_grad = x.new_zeros((graded, x.shape[1]) if save_row_grad else (0,))
    logits, slope = x.new_empty(rows.shape), x.new_ones(rows.shape)
    for span, own in _tiles(columns, weight.shape[0]):
        w = weight[span].to(x.dtype)
        z, s = transform(product(x, w), bias, logit_bias, span, scales, graded)
        forbid_(z, masks, span)
        at = (rows[own], columns[own] - span.start)
        logits[own] = z[at]
        if s is not None:
            slope[own] = s[at]
        z[at] = -torch.inf
        old, peak = peak, torch.maximum(peak, z.amax(1, keepdim=True))
        shrink = (old - peak).exp_()
        z.sub_(peak).exp_()
        total.mul_(shrink).add_(z.sum(1, keepdim=True))
        if save_row_grad:
            if s is not None:
                z.mul_(s)
            row_grad.mul_(shrink[:graded]).add_(product(z[:graded], w.T))
    if masks is not None:
        slope.masked_fill_(forbidden_entries(masks, rows, columns), 0.0)
    return logits, slope, peak[:, 0], total[:, 0], row_grad


def _with_entries(
    rows: Tensor, logits: Tensor, slope: Tensor, rest_peak: Tensor, rest_total: Tensor, row_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs. Entries at the maximum are counted apart: 1 - p of one is the sum of the others."""
    peak = rest_peak.scatter_reduce(0, rows, logits, "amax")
    shift, z = rest_peak - peak, logits - peak[rows]
    is_peak = logits == peak[rows]
    others = rest_total * shift.double().exp()
    others.index_add_(0, rows, z.double().exp().masked_fill_(is_peak, 0.0))
    ones = torch.zeros_like(others).index_add_(0, rows, is_peak.double())
    log_total = torch.where(ones > 0, (others + (ones - 1.0)).log1p(), others.log()).to(peak.dtype)
    if row_grad.dim() == 2:
        row_grad.mul_((shift - log_total).exp()[: row_grad.shape[0], None])
    lse_parts = torch.stack([peak, log_total])
    return z - log_total[rows], lse_parts.sum(0), slope, lse_parts, row_grad


def frozen_backward(
    grad_log_p: Tensor,
    grad_lse: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    row_grad: Tensor,
    factor: float,
) -> Tensor:
    """d hidden (R, D); rows that o lacks have no upstream gradient."""
    rest, at_entries = logit_grads(grad_log_p, grad_lse, rows, log_p, slope)
    graded, num_rows = row_grad.shape[0], rest.shape[0]
    grad = row_grad * rest[:graded, None]
    if graded < num_rows:
        grad = torch.nn.functional.pad(grad, (0, 0, 0, num_rows - graded))
    for part in torch.arange(len(rows), device=rows.device).split(ENTRY_TILE):
        grad.index_add_(0, rows[part], at_entries[part, None] * weight[columns[part]].to(grad.dtype))
    return grad.mul_(factor).to(weight.dtype)


def backward(
    grad_log_p: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    lse_parts: Tensor,
    scales: Scales,
    graded: int,
    needs: list[bool],
    masks: Masks = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden (R, D), d weight (V, D), d bias (V,), each (0,) if not needed; the logits are recomputed."""
    x = _scaled_hidden(hidden, scales)
    rest, at_entries = logit_grads(grad_log_p, grad_lse, rows, log_p, slope)
    factor = scales[0] / scales[2]
    peak, log_total = lse_parts[:, :, None]
    need_hidden, need_weight, need_bias = needs
    grad_hidden = x.new_zeros(hidden.shape if need_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_empty(weight.shape[:1] if need_bias else (0,))
    for span, own in _tiles(columns, weight.shape[0]):
        w = weight[span]
        z, s = transform(product(x, w.to(x.dtype)), bias, logit_bias, span, scales, graded)
        forbid_(z, masks, span)
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


def hidden_scale(scales: Scales) -> float:
    """What products hidden W^T are multiplied by before `transform`."""
    logit_scale, softcap, temperature = scales
    return logit_scale / (temperature if softcap is None else softcap)


def _scaled_hidden(hidden: Tensor, scales: Scales) -> Tensor:
    return hidden.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32) * hidden_scale(scales)


def _tiles(columns: Tensor, vocab: int) -> list[tuple[slice, slice]]:
    """Column range and entry range of every tile."""
    starts = list(range(0, vocab, VOCAB_TILE)) + [vocab]
    cuts = torch.searchsorted(columns, torch.tensor(starts, device=columns.device)).tolist()
    return [
        (slice(a, b), slice(i, j))
        for a, b, i, j in zip(starts[:-1], starts[1:], cuts[:-1], cuts[1:], strict=True)
    ]


def transform(
    z: Tensor,  # (R, width of the span), products times hidden_scale; overwritten
    bias: Tensor | None,
    logit_bias: Tensor | None,
    span: slice,
    scales: Scales,
    num_policy: int,
) -> tuple[Tensor, Tensor | None]:
    """Logits of a span of the vocabulary and, with a softcap, its derivative."""
    _, softcap, temperature = scales
    slope = None
    if bias is not None:
        z.add_(bias[span].to(z.dtype), alpha=hidden_scale(scales))
    if softcap is not None:
        z.tanh_()
        slope = 1.0 - z * z
        z.mul_(softcap / temperature)
    if logit_bias is not None and logit_bias.dim() == 1:
        z.add_(logit_bias[span].to(z.dtype), alpha=1.0 / temperature)
    elif logit_bias is not None:
        for part, mask in zip((z[:num_policy], z[num_policy:]), logit_bias[:, span], strict=True):
            part.add_(mask.to(z.dtype), alpha=1.0 / temperature)
    return z, slope


def logit_grads(
    grad_log_p: Tensor, grad_lse: Tensor, rows: Tensor, log_p: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """-(G - l) of every row, and temperature * dL/dx of every entry."""
    total = torch.zeros_like(grad_lse)
    # each in a fixed order
    if total.is_cuda:
        total.index_put_((rows,), grad_log_p, accumulate=True)
    else:
        total.index_add_(0, rows, grad_log_p)
    others = total[rows] - grad_log_p - grad_lse[rows]
    at_entries = (grad_log_p * -torch.expm1(log_p) - log_p.exp() * others) * slope
    return grad_lse - total, at_entries
