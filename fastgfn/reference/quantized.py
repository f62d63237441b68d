"""Plain truth for products in 8 bits.

A row of x, and a row of the weight, is a scale times values of 8 bits: the scale is the row's largest
magnitude over the largest value, 127 of int8 or 448 of float8_e4m3fn, and the values are the nearest
(Dettmers et al., 2022, LLM.int8(), section 2; Micikevicius et al., 2022, FP8 formats for deep learning,
section 3).

For int8 both are rotated first, which changes no product: single channels may hold nearly all of a row's
square, and the units of the other values would be as large as those values (Ashkboos et al., 2024, QuaRot,
section 4). A Hadamard matrix mixes `size` values K / size apart, size the largest power of two up to 64 that
divides K.
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rotate(x: Tensor) -> Tensor:
    """x (T, K) H / sqrt(size)."""
    size = 1
    while size < 64 and x.shape[1] % (2 * size) == 0 and x.shape[1]:
        pairs = x.reshape(len(x), size, 2, x.shape[1] // (2 * size))
        a, b = pairs.unbind(2)
        x = torch.stack([a + b, a - b], 2).flatten(1) / 2**0.5
        size *= 2
    return x


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values (T, K) in dtype and scale (T,), 0 for a row of zeros: x, rotated for int8, is about
    scale[:, None] * values."""
    x = rotate(x) if dtype == torch.int8 else x
    scale = x.abs().amax(1) / LARGEST[dtype] if x.shape[1] else x.new_zeros(len(x))
    values = torch.where(scale[:, None] > 0, x / scale[:, None], 0.0)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, N) = Q(x) Q(weight).T + bias, where Q rounds rows to scale * values."""
    x, weight = (scale[:, None] * values.to(scale.dtype) for values, scale in _both(x, weight, dtype))
    out = x @ weight.T
    return out if bias is None else out + bias


def error_bound(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, N), no less than |Q(x) Q(weight).T - x weight.T|: half a unit of every value."""
    dx, dw = (_half_units(values, dtype) * scale[:, None] for values, scale in _both(x, weight, dtype))
    x, weight = (rotate(t) if dtype == torch.int8 else t for t in (x, weight))
    return dx @ weight.abs().T + x.abs() @ dw.T + dx @ dw.T


def _both(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    return quantize_rows(x, dtype), quantize_rows(weight, dtype)


def _half_units(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of int8 1/2; of float8_e4m3fn 2^-4 of the value, whose exponent is at least -6."""
    values = values.double().abs()
    return torch.full_like(values, 0.5) if dtype == torch.int8 else values.clamp(min=2.0**-6) / 16
