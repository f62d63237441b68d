"""The backward pass of `fastgfn::linear_log_probs` for a head that is trained, on a GPU.

3 products of 2 R V D FLOP, the logits made again, by spans of the vocabulary as wide as a chunk of logits may
be, so that d W of a span is written once; 16-bit inputs are summed in float32. It never waits for the GPU.
"""

import torch
from torch import Tensor

from fastgfn.ops import head, head_masks, head_tiles


def backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    logit_bias: Tensor | None,
    rows: Tensor,  # (E,), any that are out of range
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    lse_parts: Tensor,
    scales: head_tiles.Scales,
    graded: int,
    needs: list[bool],
    masks: head_masks.Masks = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden (R, D), d weight (V, D), d bias (V,), each (0,) if not needed."""
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    in_range = (rows >= 0) & (rows < num_rows) & (columns >= 0) & (columns < vocab)
    # What is out of range goes to a row, and what lies outside of a span to a column, that nothing reads.
    rows = torch.where(in_range, rows, num_rows)
    rest, at_entries = head_tiles.logit_grads(
        grad_log_p, torch.nn.functional.pad(grad_lse, (0, 1)), rows, log_p, slope
    )
    rest = rest[:num_rows, None]
    peak, log_total = lse_parts[:, :, None]
    need_hidden, need_weight, need_bias = needs
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=torch.float32)
    part = torch.empty_like(grad_hidden)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    grad_bias = weight.new_empty(weight.shape[:1] if need_bias else (0,))
    width = head.chunk_rows(vocab, 4 * max(1, num_rows))
    buffer = hidden.new_empty(num_rows + 1, width + head.VOCAB_MULTIPLE, dtype=torch.float32)
    for first in range(0, vocab, width):
        span = slice(first, min(first + width, vocab))
        w, z = weight[span], buffer[:num_rows, : min(width, vocab - first)]
        head.mm(hidden, w.T, z)
        z.mul_(head_tiles.hidden_scale(scales))
        _, s = head_tiles.transform(z, bias, logit_bias, span, scales, graded)
        head_masks.forbid_(z, masks, span)
        z.sub_(peak).sub_(log_total).exp_().mul_(rest)
        if s is not None:
            z.mul_(s)
        inside = in_range & (columns >= span.start) & (columns < span.stop)
        buffer[rows, torch.where(inside, columns - first, width)] = at_entries
        z.mul_(scales[0] / scales[2])
        low = z.to(w.dtype)
        if need_hidden:
            head.mm(low, w, part)
            grad_hidden.add_(part)
        if need_weight:
            torch.mm(low.T, hidden, out=grad_weight[span])
        if need_bias:
            grad_bias[span] = z.sum(0)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias
