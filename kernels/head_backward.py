"""The gradient of a frozen head from what its forward pass saved: one pass over o, no product with W.

Equations: fastgfn/reference/linear_log_probs.py. Per hidden element 4 bytes of o are read and 2 written, with
the weight's row of every entry beside them: 20 us for R = 4096, D = 2048 and two entries a row at 4.3 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.head import IS_INTERPRETED, _entries

# (entries, width) of one tile, warps.
TILE = (8, 512, 4)


# One program writes BLOCK_D elements of one row of d hidden: with the upstream gradients g_e of the row's
# entries, their sum G and l of lse, factor * ((l - G) o + sum_e a_e W[column_e]),
# a_e = (g_e (1 - p_e) - p_e (G - g_e - l)) softcap'_e. Grid (rows, width / BLOCK_D); rows from num_grad_rows
# on have no o.
@triton.jit(do_not_specialize=["num_grad_rows"])
def _frozen_head_bwd_kernel(
    grad_log_p_ptr,
    grad_lse_ptr,
    weight_ptr,
    entry_starts_ptr,
    entry_columns_ptr,
    log_p_ptr,
    slope_ptr,
    row_grad_ptr,
    grad_hidden_ptr,
    num_grad_rows,
    vocab,
    stride_weight_v,
    stride_weight_d,
    factor,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = depth < WIDTH
    own = tl.load(entry_starts_ptr + row).to(tl.int64)
    end = tl.load(entry_starts_ptr + row + 1).to(tl.int64)
    grad_lse = tl.load(grad_lse_ptr + row)
    total = grad_lse * 0.0
    start = own
    while start < end:
        e, _, is_read = _entries(entry_columns_ptr, start, end, vocab, BLOCK_E)
        total += tl.sum(tl.load(grad_log_p_ptr + e, mask=is_read, other=0.0), axis=0)
        start += BLOCK_E
    out = tl.zeros((BLOCK_D,), tl.float32)
    if row < num_grad_rows:
        out = tl.load(row_grad_ptr + row * WIDTH + depth, mask=in_width, other=0.0) * (grad_lse - total)
    start = own
    while start < end:
        e, column, is_read = _entries(entry_columns_ptr, start, end, vocab, BLOCK_E)
        grad = tl.load(grad_log_p_ptr + e, mask=is_read, other=0.0)
        log_p = tl.load(log_p_ptr + e, mask=is_read, other=0.0)
        slope = tl.load(slope_ptr + e, mask=is_read, other=0.0)
        at_entry = grad * _one_minus_exp(log_p) - tl.exp(log_p) * (total - grad - grad_lse)
        at_entry = tl.where(is_read, at_entry * slope, 0.0)
        pointers = weight_ptr + column[:, None] * stride_weight_v
        pointers += depth.to(tl.int64)[None, :] * stride_weight_d
        w = tl.load(pointers, mask=is_read[:, None] & in_width[None, :], other=0.0).to(tl.float32)
        out += tl.sum(at_entry[:, None] * w, axis=0)
        start += BLOCK_E
    pointers = grad_hidden_ptr + row * WIDTH + depth
    tl.store(pointers, (out * factor).to(grad_hidden_ptr.dtype.element_ty), mask=in_width)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 to full precision: next to 1, the rounding of exp(x) cancels in the quotient."""
    u = tl.exp(x)
    near = tl.where((u > 0.5) & (u < 1.0), u, 0.5)
    return tl.where(u >= 1.0, -x, tl.where(u > 0.5, (1.0 - near) * (x / tl.log(near)), 1.0 - u))


def frozen_head_backward(
    grad_log_p: Tensor,  # (E,) float32 contiguous
    grad_lse: Tensor,  # (R,) float32 contiguous
    weight: Tensor,  # (V, D), any strides
    starts: Tensor,  # (R + 1,) int64: the entries of row r are starts[r] to starts[r + 1]
    columns: Tensor,  # (E,) int64
    log_p: Tensor,  # (E,) float32
    slope: Tensor,  # (E,) float32
    row_grad: Tensor,  # (num_grad_rows, D) float32 contiguous
    factor: float,
) -> Tensor:
    """d hidden (R, D) in the dtype of weight; a column out of range adds nothing."""
    block_e, block_d, num_warps = TILE
    num_rows, (vocab, width) = grad_lse.shape[0], weight.shape
    # The interpreter cuts bfloat16 off where a GPU rounds.
    dtype = torch.float32 if IS_INTERPRETED else weight.dtype
    grad_hidden = torch.empty(num_rows, width, dtype=dtype, device=weight.device)
    if grad_hidden.numel():
        block_d = min(block_d, triton.next_power_of_2(width))
        with torch.cuda.device_of(weight):
            _frozen_head_bwd_kernel[(num_rows, triton.cdiv(width, block_d))](
                grad_log_p,
                grad_lse,
                weight,
                starts,
                columns,
                log_p,
                slope,
                row_grad,
                grad_hidden,
                row_grad.shape[0],
                vocab,
                *weight.stride(),
                factor,
                WIDTH=width,
                BLOCK_E=block_e,
                BLOCK_D=block_d,
                num_warps=num_warps,
            )
    return grad_hidden.to(weight.dtype)
