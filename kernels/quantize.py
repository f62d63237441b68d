"""Rows in float8_e4m3fn, each with a scale of its own. Equations: fastgfn/reference/quantized.py.

A row is read twice, the second time from L1; a launch of T rows moves T K (itemsize + 1) bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of one load -> warps; the first that covers a row, or the last.
BLOCKS = {1024: 4, 4096: 8}


@triton.jit
def _to_float8(x):
    # To the nearest, ties to even, in float32: where rounding carries, the interpreter's cast halves it.
    # A sum whose unit is 2^-3 of the power of two below |x|, at least 2^-9, rounds; what is cast is exact.
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    rounder = tl.maximum(power, 0.015625) * 1572864.0
    return ((x + rounder) - rounder).to(tl.float8e4nv)


# One program takes one row: its largest magnitude, then its values over that. Grid (rows,). Writes values
# (T, K) in [-448, 448] and scale (T,). A row of magnitudes below 2^-100 counts as zeros, its reciprocal might
# overflow; nan and inf give a row of products that are not finite.
@triton.jit
def _quantize_rows_fwd_kernel(x_ptr, values_ptr, scale_ptr, stride_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * stride_x + at, mask=at < width, other=0.0).to(tl.float32)
        # as integers the bits of nan are the largest
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(largest, 0).to(tl.float32, bitcast=True)
    is_zero = most < 7.888609052210118e-31
    factor = tl.where(is_zero, 0.0, 448.0 / tl.where(is_zero, 1.0, most))
    tl.store(scale_ptr + row, tl.where(is_zero, 0.0, most / 448.0))
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * stride_x + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(values_ptr + row * width + at, _to_float8(x * factor), mask=at < width)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """values (T, K) float8_e4m3fn and scale (T,) of x (T, K) with unit stride in K."""
    (num_rows, width), device = x.shape, x.device
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=device)
    block = next((size for size in BLOCKS if size >= width), max(BLOCKS))
    if num_rows:
        _quantize_rows_fwd_kernel[(num_rows,)](
            x, values, scale, x.stride(0), width, BLOCK=block, num_warps=BLOCKS[block]
        )
    return values, scale
