"""Products in 8 bits, with a scale per row of weights and activations: int8 (CPU), float8_e4m3fn (CUDA).

A weight is quantised once, the rows of x in every product, by `fastgfn::quantize_rows` (csrc/quantize.cpp;
CUDA: Triton, kernels/quantize.py); no row of x changes the result of another. int8 rotates rows first, float8
needs no rotation. Equations: `reference/quantized.py`.

What it costs next to bfloat16: weights take half the memory. On a CPU with VNNI products of many rows and
columns take less time, those of few rows or columns more, and quantising a weight takes longer than packing
it (bench/NOTES.md). Elsewhere the int8 weight is widened in every product: less memory, more time.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn import checks

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.int8, FLOAT8)
# Width and height of a float8 weight, which the tensor cores' product wants as multiples.
FLOAT8_UNIT = 16
HAS_QLINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
# From here on GPUs multiply float8.
LEAST_CAPABILITY = (8, 9)
# Sums of more products of a byte and an int8 may pass 2^31.
MOST_COLUMNS = 2**16


class QuantizedWeight(NamedTuple):
    """A weight, about scale[:, None] * values."""

    values: Tensor  # (N, K) int8, (K, N) where oneDNN packs it, or float8_e4m3fn
    scale: Tensor  # (N,) float32

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """A floating-point weight (N, K) in int8 (CPU) or float8_e4m3fn (N and K multiples of 16)."""
    checks.check(dtype in DTYPES, "quantize_weight", "dtype", DTYPES, dtype, "choose one of them")
    checks.check_shape("quantize_weight", "weight", weight, ("N", "K"), "pass one matrix")
    checks.check_floating("quantize_weight", "weight", weight)
    if dtype == FLOAT8:
        fits, have = is_float8_shape(weight), tuple(weight.shape)
        fix = "leave this weight in bfloat16"
        checks.check(fits, "quantize_weight", "weight", "(N, K), multiples of 16", have, fix)
        return QuantizedWeight(*quantize_rows(weight, FLOAT8))
    on_cpu, have, fix = weight.device.type == "cpu", weight.device, "use torch.float8_e4m3fn there"
    checks.check(on_cpu, "quantize_weight", "weight", "on the CPU for int8", have, fix)
    values, scale = quantize_rows(weight, torch.uint8)
    values = values.bitwise_xor_(128).view(torch.int8)
    if _packs_int8(values):
        values = torch.ops.onednn.qlinear_prepack(values, None)
    return QuantizedWeight(values, scale)


def is_float8_shape(weight: Tensor) -> bool:
    return weight.numel() > 0 and all(size % FLOAT8_UNIT == 0 for size in weight.shape)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values (T, K) in dtype, and scale (T,) float32, of x (T, K); no gradient.

    uint8 (CPU): 128 more than the int8 of the reference, rotated as there, as the product wants it. A row of
    magnitudes below 2^-100 counts as zeros; one with nan or inf gives products that are not finite.
    """
    is_read = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and x.is_cuda)
    if x.is_floating_point() and not is_read:
        x = x.float()
    return torch.ops.fastgfn.quantize_rows(x, dtype)


def quantized_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """(..., N) = x (..., K) @ weight.T + bias in the dtype of x, without gradient.

    int8: sums are exact integers, so that the bits of a row depend on nothing but it. float8: sums in
    float32, rounded to bfloat16.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = (_float8_product if weight.dtype == FLOAT8 else _int8_product)(rows, weight)
    if bias is not None:
        out = out.add_(bias)
    return out.to(x.dtype).view(*x.shape[:-1], out.shape[1])


def _int8_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """(T, N) float32."""
    if not len(x):
        return x.new_empty(0, len(weight.scale), dtype=torch.float32)
    values, scale = quantize_rows(x, torch.uint8)
    if weight.values.is_mkldnn:
        zero = weight.scale.new_zeros(len(weight.scale), dtype=torch.int64)
        options = (None, 1.0, 0, torch.float32, "none", [], "")
        out = _qlinear(values, 1.0, 128, weight.values, weight.scale, zero, *options)
    else:
        out = F.linear(values.float().sub_(128), weight.values.float()).mul_(weight.scale)
    return out.mul_(scale[:, None])


def _float8_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """(T, N) bfloat16."""
    values, scale = quantize_rows(x, FLOAT8)
    options = dict(out_dtype=torch.bfloat16)
    return torch._scaled_mm(values, weight.values.T, scale[:, None], weight.scale[None], **options)


_qlinear = torch.ops.onednn.qlinear_pointwise.default if HAS_QLINEAR else None


def _packs_int8(values: Tensor) -> bool:
    usable = HAS_QLINEAR and torch.backends.mkldnn.enabled and values.numel() > 0
    usable = usable and values.shape[1] <= MOST_COLUMNS
    return usable and torch.cpu._is_vnni_supported() and _is_exact()


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN's sums of products are exact: without VNNI, pairs of them saturate at 16 bits."""
    x = torch.full((16, 64), 255, dtype=torch.uint8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(torch.full_like(x, 127, dtype=torch.int8), None)
    scale, zero = x.new_ones(16, dtype=torch.float32), x.new_zeros(16, dtype=torch.int64)
    out = _qlinear(x, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return bool((out == 127 * 127 * 64).all())


def quantize_rows_triton(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from fastgfn.kernels import quantize as kernels

    fix = "quantise on the CPU"
    checks.check(dtype == FLOAT8, "quantize_rows", "dtype", "torch.float8_e4m3fn on CUDA", dtype, fix)
    return kernels.quantize_rows(x if x.stride(1) == 1 else x.contiguous())


torch.library.impl("fastgfn::quantize_rows", "cuda", quantize_rows_triton)


@torch.library.register_fake("fastgfn::quantize_rows")
def _(x, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)
