import pytest
import torch
from torch.library import opcheck

from fastgfn.ops import linear as ops
from fastgfn.reference import linear as ref
from fastgfn.testing import assert_close_to_truth, relative_error


@pytest.fixture(autouse=True)
def _no_product_is_small(monkeypatch):
    """oneDNN where torch would take products of these sizes."""
    monkeypatch.setattr(ops, "FEWEST_PRODUCTS", 0)


def inputs(dtype, shape=(7, 24), out=18, rank=3, bias=True, seed=0):
    """x, weight, bias, lora_a, lora_b; the last two and x want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    width = shape[-1]
    x, a, b = draw(*shape), draw(rank, width), draw(out, rank)
    return [x, draw(out, width), draw(out) if bias else None, a, b]


def run(function, args, with_lora):
    chosen = [0, 3, 4] if with_lora else [0]
    for i in chosen:
        args[i] = args[i].detach().requires_grad_()
    out = function(*args, 0.7) if with_lora else function(*args[:3])
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [args[i] for i in chosen], upstream)]


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference_with_gradients(with_lora, bias, dtype):
    op, reference = (getattr(m, "lora_linear" if with_lora else "frozen_linear") for m in (ops, ref))
    truth = run(reference, [t if t is None else t.double() for t in inputs(dtype, bias=bias)], with_lora)
    naive = run(reference, inputs(dtype, bias=bias), with_lora)
    fused = run(op, inputs(dtype, bias=bias), with_lora)
    for i, values in enumerate(zip(fused, naive, truth, strict=True)):
        assert_close_to_truth(f"value {i}", *values, grad=i > 0)


@pytest.mark.parametrize("with_lora", [True, False])
def test_gradcheck(with_lora):
    x, weight, bias, a, b = inputs(torch.float64, (3, 5), 4, 2)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    if with_lora:
        assert torch.autograd.gradcheck(
            lambda *t: ops.lora_linear(t[0], weight, bias, *t[1:], 0.7), (x, a, b)
        )
    else:
        assert torch.autograd.gradcheck(lambda t: ops.frozen_linear(t, weight, bias), x)


# One row, no rows, more axes, a transposed and a strided weight, rank 1, widths that fill no vector register.
def test_odd_shapes():
    for shape, out, rank in (((1, 17), 5, 1), ((0, 8), 4, 2), ((2, 3, 9), 33, 4), ((9,), 3, 2)):
        args = inputs(torch.float32, shape, out, rank)
        got, want = (run(m.lora_linear, args, True) for m in (ops, ref))
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and relative_error(a, b) < 1e-5
    x, weight, *_ = inputs(torch.float32)
    for view in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :24], weight.repeat(2, 1)[::2]):
        assert relative_error(ops.product(x, view), x @ view.T) < 1e-6
    strided = torch.randn(7, 48)[:, ::2]
    assert relative_error(ops.product(strided, weight), strided @ weight.T) < 1e-6
    numbers = torch.randn(60)
    for overlapping in (numbers.as_strided((18, 24), (1, 1)), numbers[:24].expand(18, 24)):
        assert relative_error(ops.product(x, overlapping), x @ overlapping.T) < 1e-6


@pytest.mark.parametrize("bias", ["column", "expanded", "reversed_step"])
def test_a_bias_of_any_stride(bias):
    x, weight, _, a, b = inputs(torch.float32)
    table = torch.randn(18, 5)
    bias = {
        "column": table[:, 1],
        "expanded": table[:1, 0].expand(18),
        "reversed_step": table.flatten()[::5][:18],
    }[bias]
    assert not bias.is_contiguous()
    for w in (weight, ops.packed(weight)):
        assert relative_error(ops.product(x, w, bias), x @ weight.T + bias) < 1e-6
    for got, want in (
        (ops.frozen_linear(x, weight, bias), ref.frozen_linear(x, weight, bias)),
        (ops.lora_linear(x, weight, bias, a, b, 0.7), ref.lora_linear(x, weight, bias, a, b, 0.7)),
    ):
        assert relative_error(got, want) < 1e-6


def test_follows_the_switch_of_torch():
    x, weight, *_ = inputs(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(ops.product(x, weight), torch.nn.functional.linear(x, weight))
        assert not ops.packed(weight).is_mkldnn


@pytest.mark.parametrize("with_lora", [True, False])
def test_a_strided_bias(with_lora):
    args = inputs(torch.float32)
    want = run(ops.lora_linear if with_lora else ops.frozen_linear, list(args), with_lora)
    args[2] = torch.stack([args[2], torch.full((18,), torch.nan)], 1)[:, 0]
    got = run(ops.lora_linear if with_lora else ops.frozen_linear, args, with_lora)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    packed = ops.packed(args[1])
    assert torch.equal(ops.product(args[0], packed, args[2]), ops.product(args[0], packed, args[2].clone()))


def test_no_input_features():
    for bias in (True, False):
        args = inputs(torch.float32, (2, 3, 0), 5, 2, bias)
        for with_lora, name in ((True, "lora_linear"), (False, "frozen_linear")):
            got, want = (run(getattr(m, name), list(args), with_lora) for m in (ops, ref))
            assert got[0].shape == (2, 3, 5) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_packed_weight_gives_the_same_product_for_any_number_of_rows(dtype):
    _, weight, bias, *_ = inputs(dtype, out=40)
    packed = ops.packed(weight)
    low = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert packed.is_mkldnn == (ops.HAS_ONEDNN and (dtype == torch.float32 or low))
    for rows in (1, 2, 16, 65):
        x = torch.randn(rows, 24, dtype=dtype)
        want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        naive = torch.nn.functional.linear(x, weight, bias)
        assert_close_to_truth("packed", ops.product(x, packed, bias), naive, want)


def test_nan_and_inf_come_through():
    x, weight, *_ = inputs(torch.float32)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    for w in (weight, ops.packed(weight)):
        out = ops.product(x, w)
        assert out[0].isnan().all() and not out[1].isfinite().any() and out[2:].isfinite().all()


def test_repeat_gives_equal_bits():
    first, second = (run(ops.lora_linear, inputs(torch.float32, (65, 96), 80, 8), True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, weight, b, lora_a, lora_b = inputs(torch.float32, bias=bias)
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    opcheck(torch.ops.fastgfn.lora_linear.default, (leaves[0], weight, b, *leaves[1:], 0.7))
    opcheck(torch.ops.fastgfn.frozen_linear.default, (leaves[0], weight, b))


def test_refuses_bad_input():
    x, weight, bias, a, b = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"lora_linear: weight must be \(N, 24\), got \(24, 18\)"):
        ops.lora_linear(x, weight.T, bias, a, b, 1.0)
    with pytest.raises(ValueError, match=r"lora_linear: lora_a must be \(3, 24\), got \(3, 18\)"):
        ops.lora_linear(x, weight, bias, b.T, b, 1.0)
    with pytest.raises(ValueError, match=r"lora_linear: lora_b must be \(18, 3\), got \(3, 18\)"):
        ops.lora_linear(x, weight, bias, a, b.T, 1.0)
    with pytest.raises(TypeError, match="frozen_linear: weight must be torch.float32, got torch.float64"):
        ops.frozen_linear(x, weight.double(), bias)
    with pytest.raises(ValueError, match="frozen_linear: weight must be frozen, got one that requires grad"):
        ops.frozen_linear(x, weight.requires_grad_(), bias)


@pytest.mark.skipif(not ops.HAS_ONEDNN, reason="torch was built without oneDNN")
def test_small_products_are_left_to_torch(monkeypatch):
    """Of any shape that torch sees for the first time; a packed weight goes where it was packed for."""
    x, weight = inputs(torch.float32, shape=(16, 32), out=64)[:2]
    calls, onednn = [], ops._onednn
    monkeypatch.setattr(ops, "_onednn", lambda *args: calls.append(1) or onednn(*args))
    monkeypatch.setattr(ops, "FEWEST_PRODUCTS", 16 * 32 * 64)
    small = ops.product(x[1:], weight)
    assert not calls and torch.equal(small, torch.nn.functional.linear(x[1:], weight))
    whole = ops.product(x, weight)
    assert len(calls) == 1 and relative_error(whole[1:], small) < 1e-6
    ops.product(x[1:], ops.packed(weight))
    assert len(calls) == 2
