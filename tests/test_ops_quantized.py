"""Products in 8 bits: csrc C++ and oneDNN on the CPU, Triton and torch._scaled_mm on CUDA."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from fastgfn.ops import quantized as ops
from fastgfn.ops.linear import packed, product, rollout_weight
from fastgfn.ops.quantized import FLOAT8, quantize_rows, quantize_rows_triton, quantize_weight
from fastgfn.reference import quantized as ref
from fastgfn.testing import assert_close_to_truth

TRITON_DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
DTYPES = [torch.int8, FLOAT8]
# Rows and columns of no block, one row and one column, no rows, wide rows, rows of zeros, no vector register.
SHAPES = [(7, 70), (1, 1), (0, 8), (3, 5000), (16, 0), (2, 2048), (5, 17)]


def draw(*shape, dtype=torch.float32, seed=0):
    """Rows of magnitudes 10^-3 to 10^3, some of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 10 ** (torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) * 6 - 3)
    x[3::4] = 0
    return x.to(dtype)


def signed(values):
    """The numbers that values of uint8 or float8 stand for."""
    return values.double() - 128 if values.dtype == torch.uint8 else values.double()


def assert_rows(got, x, dtype):
    values, scale = (t.cpu() for t in got)
    assert values.shape == x.shape and values.dtype == (torch.uint8 if dtype == torch.int8 else dtype)
    want_values, want_scale = ref.quantize_rows(x.double(), dtype)
    torch.testing.assert_close(scale.double(), want_scale, rtol=1e-6, atol=0)
    # neighbours where the exact quotient is half way between them, but for rounding
    exact = ref.rotate(x.double()) if dtype == torch.int8 else x.double()
    exact = exact / want_scale.where(want_scale > 0, 1.0)[:, None]
    found, best = ((signed(v) - exact).abs() for v in (values, want_values.double()))
    assert bool((found <= best + 1e-4).all())
    assert (signed(values) != want_values.double()).sum() <= 1 + x.numel() // 1000


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_equal_the_reference(dtype, x_dtype):
    stored = torch.uint8 if dtype == torch.int8 else dtype
    for shape in SHAPES:
        x = draw(*shape, dtype=x_dtype)
        assert_rows(quantize_rows(x, stored), x.float(), dtype)
        if dtype == FLOAT8 and x_dtype in (torch.float32, torch.bfloat16):
            assert_rows(quantize_rows_triton(x.to(TRITON_DEVICE), dtype), x.float(), dtype)


def inputs(dtype, rows=9, width=48, out=32, bias=True):
    sizes = ((rows, width), (out, width), (out,))
    x, weight, b = (torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)
    return x, weight, b if bias else None


@pytest.fixture(params=["packed", "plain"])
def way(request, monkeypatch):
    """With oneDNN, where that is exact, or without."""
    if request.param == "plain":
        monkeypatch.setattr(ops, "_packs_int8", lambda values: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_equals_the_reference(dtype, x_dtype, bias):
    """And the product without quantisation, within half a unit of every value."""
    x, weight, b = inputs(x_dtype, bias=bias)
    wide = [t if t is None else t.double() for t in (x, weight, b)]
    truth = ref.quantized_linear(*wide, dtype)
    # float8 rounds to bfloat16 before the bias
    sums, kind = ref.quantized_linear(*wide[:2], None, dtype), torch.bfloat16 if dtype == FLOAT8 else x_dtype
    naive = sums.to(torch.float32 if kind == torch.float64 else kind)
    naive = naive if b is None else (naive + b.to(naive.dtype))
    out = product(x, quantize_weight(weight, dtype), b)
    assert out.dtype == x_dtype
    assert_close_to_truth("product", out, naive, truth)
    exact = torch.nn.functional.linear(*wide)
    bound, rounding = ref.error_bound(*wide[:2], dtype), torch.finfo(naive.dtype).eps
    error = (out.double() - exact).abs()
    assert bool((error <= bound + rounding * (4 + exact.abs())).all())
    assert 1e-3 < float(error.norm() / exact.norm()) < {torch.int8: 0.02, FLOAT8: 0.06}[dtype]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(dtype):
    unit = 1 if dtype == torch.int8 else 16
    for shape, out in (((1, unit), unit), ((0, 16), 32), ((2, 3, 32), 48), ((16,), 16), ((200, 16), 16)):
        x, weight = torch.randn(shape), torch.randn(out, shape[-1])
        got = product(x, quantize_weight(weight, dtype))
        assert got.shape == (*shape[:-1], out)
        want = ref.quantized_linear(x.reshape(-1, shape[-1]).double(), weight.double(), None, dtype)
        torch.testing.assert_close(got.double().view(want.shape), want, rtol=1e-2, atol=1e-2)
    for weight in (torch.randn(48, 64)[:, ::2], torch.randn(32, 48).T, torch.randn(1, 32).expand(48, 32)):
        x = torch.randn(6, 64)[:, ::2]
        plain = product(x.contiguous(), quantize_weight(weight.contiguous(), dtype))
        assert torch.equal(product(x, quantize_weight(weight, dtype)), plain)
    if dtype == torch.int8:
        # more columns than int32 can sum: not packed, so that no sum wraps
        x, wide = torch.ones(1, 70001), torch.ones(2, 70001)
        assert float(product(x, quantize_weight(wide, dtype))[0, 0]) == pytest.approx(70001, rel=1e-3)
    for x in (torch.randn(3, 0), torch.randn(0, 0)):
        if dtype == torch.int8:
            assert torch.equal(product(x, quantize_weight(torch.randn(4, 0), dtype)), torch.zeros(len(x), 4))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other_and_repeat(dtype):
    x, weight, bias = torch.randn(65, 576), torch.randn(64, 576), torch.randn(64)
    x[7] *= 1e4
    quantized = quantize_weight(weight, dtype)
    whole = product(x, quantized, bias)
    assert torch.equal(whole, product(x, quantize_weight(weight, dtype), bias))
    if dtype == torch.int8:
        for part in ([0], [7], list(range(16)), [64, 3, 3]):
            assert torch.equal(product(x[part], quantized, bias), whole[part])


def test_opcheck():
    for x in (torch.randn(3, 5), torch.randn(4, 6).bfloat16().T):
        for dtype in (torch.uint8, FLOAT8):
            opcheck(torch.ops.fastgfn.quantize_rows.default, (x, dtype))


def test_refuses_bad_input():
    weight = torch.randn(16, 24)
    with pytest.raises(ValueError, match=r"weight must be \(N, K\), multiples of 16, got \(16, 24\); leave"):
        quantize_weight(weight, FLOAT8)
    with pytest.raises(ValueError, match="quantize_weight: dtype must be .* got torch.bfloat16; choose one"):
        quantize_weight(weight, torch.bfloat16)
    with pytest.raises(TypeError, match="quantize_weight: weight must be floating point, got torch.int64"):
        quantize_weight(weight.long(), torch.int8)
    with pytest.raises(ValueError, match="weight must be on the CPU for int8, got meta; use torch.float8"):
        quantize_weight(weight.to("meta"), torch.int8)
    with pytest.raises(ValueError, match="quantize_rows: dtype must be uint8 or float8_e4m3fn, got Char"):
        quantize_rows(weight, torch.int8)
    with pytest.raises(ValueError, match="quantize_rows: x must be float32 or bfloat16, got Long"):
        quantize_rows(weight.long(), torch.uint8)
    with pytest.raises(ValueError, match="dtype must be torch.float8_e4m3fn on CUDA, got torch.uint8"):
        quantize_rows_triton(weight, torch.uint8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_come_through_and_the_tiny_do_not_overflow(dtype):
    x, weight = torch.randn(6, 32), torch.randn(16, 32)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    x[3], x[4] = 1e-38, 1e36 * x[4].sign()
    out = product(x, quantize_weight(weight, dtype))
    assert not out[:3].isfinite().any() and out[5].isfinite().all()
    assert bool((out[3] == 0).all())
    values, scale = quantize_rows(x, torch.uint8 if dtype == torch.int8 else dtype)
    assert scale[3] == 0 and scale[4].isfinite() and signed(values)[4].abs().max() > 100


def test_a_channel_that_holds_a_row_s_square_does_not_cost_the_others_their_digits():
    """Integers without the rotation would round them to about two bits."""
    x, weight = torch.randn(8, 576), torch.randn(64, 576) / 24
    x[:, 40], weight[:, 40] = 80.0, 1e-3
    exact = x.double() @ weight.double().T
    error = (product(x, quantize_weight(weight, torch.int8)).double() - exact).norm() / exact.norm()
    assert float(error) < 0.04
    plain = (x / x.abs().amax(1, keepdim=True) * 127).round() * x.abs().amax(1, keepdim=True) / 127
    assert (plain.double() @ weight.double().T - exact).norm() / exact.norm() > 0.1


def test_half_the_bytes_of_16_bits():
    weight = torch.randn(192, 576)
    sizes = {}
    for dtype in (torch.bfloat16, *DTYPES):
        made = rollout_weight(weight, dtype)
        tensors = (made,) if isinstance(made, torch.Tensor) else made
        sizes[dtype] = sum(t.numel() * t.element_size() for t in tensors)
    assert sizes[torch.int8] == sizes[FLOAT8] == sizes[torch.bfloat16] // 2 + 4 * 192


def test_what_float8_cannot_take_stays_in_16_bits():
    weight = torch.randn(16, 24)
    made = rollout_weight(weight, FLOAT8)
    assert isinstance(made, torch.Tensor) and made.dtype == torch.bfloat16
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(product(x, made), product(x, packed(weight.bfloat16())))


ISA_CALL = """
import torch
from fastgfn.ops.quantized import quantize_weight
from fastgfn.ops.linear import product
x, weight = torch.ones(20, 64), torch.ones(32, 64)
made = quantize_weight(weight, torch.int8)
assert bool((product(x, made) - 64).abs().max() < 1e-4), product(x, made)
print(made.values.is_mkldnn)
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "ALL"])
def test_sums_are_exact_on_every_instruction_set(isa):
    """Without VNNI oneDNN saturates sums of two products: torch multiplies there."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", ISA_CALL], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    has_vnni = ops.HAS_QLINEAR and torch.cpu._is_vnni_supported()
    assert done.stdout.split() == [str(isa == "ALL" and has_vnni)]


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_float8_products_on_a_gpu(x_dtype):
    """As on the CPU, also replayed from a graph after the weight changed in place."""
    if torch.cuda.get_device_capability() < ops.LEAST_CAPABILITY:
        pytest.skip("no products of float8 on this GPU")
    for rows, width, out in ((1, 16, 16), (33, 576, 1536), (512, 1536, 576)):
        x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
        x, weight, bias = (t.to("cuda", x_dtype) for t in (x, weight, bias))
        quantized = quantize_weight(weight, FLOAT8)
        got = product(x, quantized, bias)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            product(x, quantized, bias)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = product(x, quantized, bias)
        graph.replay()
        assert torch.equal(got, replayed)
        truth = ref.quantized_linear(*(t.cpu().double() for t in (x, weight, bias)), FLOAT8)
        bound = 2.0**-7 * (truth.abs() + 1)
        assert bool(((got.cpu().double() - truth).abs() <= bound).all())
        for old, new in zip(quantized, quantize_weight(-weight, FLOAT8), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(replayed, product(x, quantized, bias)) and not torch.equal(got, replayed)
