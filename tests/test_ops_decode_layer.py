"""The elementwise ops of a decoding step: torch on the CPU, and the Triton kernels in the interpreter or
compiled on a GPU."""

import shutil

import pytest
import torch
from torch.library import opcheck
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastgfn.ops import decode_layer as ops
from fastgfn.reference import decode_layer as plain
from fastgfn.testing import assert_close_to_truth

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-5


def draw(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def to(args, *to):
    return [x.to(*to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def on_device(args):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]


def check(name, got, naive, truth):
    got, naive, truth = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, naive, truth))
    assert len(got) == len(naive) == len(truth)
    for i, values in enumerate(zip(got, naive, truth, strict=True)):
        assert_close_to_truth(f"{name} {i}", *(x.cpu() for x in values))


def check_op(op, by_triton, reference, args):
    """Both backends against the reference, and equal bits on repeat."""
    naive, truth = reference(*args), reference(*to(args, torch.float64))
    for name, run, inputs in (("cpu", op, args), ("triton", by_triton, on_device(args))):
        got, again = run(*inputs), run(*inputs)
        check(name, got, naive, truth)
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, again)), strict=True)
        assert all(a.dtype == args[0].dtype and torch.equal(a, b) for a, b in pairs)


# rows, width
ROWS = {"odd": (5, 33), "one": (1, 1), "wide": (2, 1601), "even": (3, 64), "none": (0, 8)}


@DTYPES
@pytest.mark.parametrize("shape", ROWS)
def test_norms_equal_the_reference(dtype, shape):
    rows, width = ROWS[shape]
    x, delta = (draw(rows, width, dtype=dtype, scale=3) for _ in range(2))
    weight = draw(width, dtype=dtype)
    check_op(ops.rms_norm, ops._rms_norm_triton, plain.rms_norm, [x, weight, EPS])
    check_op(ops.add_rms_norm, ops._add_rms_norm_triton, plain.add_rms_norm, [x, delta, weight, EPS])
    # of rows within wider ones, and of a tiny row
    x = draw(rows, 2 * width + 1, dtype=dtype)[:, 1 : width + 1] * 1e-3
    check_op(ops.rms_norm, ops._rms_norm_triton, plain.rms_norm, [x, weight, EPS])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_round_as_the_models(dtype):
    """Bit by bit: float32 statistics, rounded before the weight; the sum is rounded before the norm."""
    x, delta, weight = draw(7, 33, dtype=dtype), draw(7, 33, dtype=dtype), draw(33, dtype=dtype)
    norm = LlamaRMSNorm(33, EPS)
    norm.weight.data = weight
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, weight, EPS), norm(x))
        total, normed = ops.add_rms_norm(x, delta, weight, EPS)
        assert torch.equal(total, x + delta) and torch.equal(normed, norm(x + delta))


def test_the_widest_row_is_that_of_the_table():
    from fastgfn.kernels.decode_layer import NORM_WARPS

    assert NORM_WARPS[-1][0] == ops.MAX_WIDTH


def test_what_is_added_may_be_of_a_lower_precision():
    x, delta, weight = draw(5, 33).float(), draw(5, 33).bfloat16(), draw(33).float()
    want = ops.add_rms_norm(x, delta.float(), weight, EPS)
    for run, inputs in (
        (ops.add_rms_norm, [x, delta, weight, EPS]),
        (ops._add_rms_norm_triton, on_device([x, delta, weight, EPS])),
    ):
        for got, expected in zip(run(*inputs), want, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-6)


# rows, query heads, key heads, head width
HEADS = {"grouped": (5, 6, 2, 16), "single": (3, 1, 1, 2), "odd_half": (2, 3, 3, 6), "wide": (2, 4, 1, 80)}
HEADS |= {"none": (0, 2, 1, 4), "group_of_three": (3, 9, 3, 64)}


def make_rows(shape, dtype, has_norms):
    """[row, cos, sin, nodes, keys, values, norms, eps]; cos and sin belong to no angle."""
    rows, heads, kv_heads, width = HEADS[shape]
    capacity = rows + 4
    numbers = [(rows, (heads + 2 * kv_heads) * width), (rows, width), (rows, width)]
    pools = [(capacity, kv_heads, width)] * 2
    row, cos, sin, keys, values = (draw(*size, dtype=dtype) for size in (*numbers, *pools))
    norms = tuple(draw(width, dtype=dtype) for _ in range(2)) if has_norms else None
    return [row, cos, sin, torch.randperm(capacity)[:rows], keys, values, norms, EPS]


def cast(args, dtype):
    norms = args[6] and tuple(to(args[6], dtype))
    return [*to(args[:6], dtype), norms, EPS]


def written(run, args):
    """(queries, keys, values) after the op, in pools of its own."""
    args = [*args[:4], args[4].clone(), args[5].clone(), *args[6:]]
    return run(*args), args[4], args[5]


def write_by_triton(*args):
    norms = args[6] or (None, None)
    return ops._rope_write_triton(*args[:6], *norms, args[7])


@DTYPES
@pytest.mark.parametrize("has_norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("shape", HEADS)
def test_rope_and_write_equal_the_reference(dtype, shape, has_norms):
    args = make_rows(shape, dtype, has_norms)
    naive, truth = plain.rope_write(*args), plain.rope_write(*cast(args, torch.float64))
    there = [*on_device(args[:6]), args[6] and tuple(on_device(args[6])), EPS]
    for name, run, inputs in (("cpu", ops.rope_write, args), ("triton", write_by_triton, there)):
        got, again = written(run, inputs), written(run, inputs)
        check(name, got, naive, truth)
        assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(got, again, strict=True))
        rest = torch.ones(len(args[4]), dtype=torch.bool).index_fill_(0, args[3], False)
        for pool, before in zip(got[1:], args[4:6], strict=True):
            assert torch.equal(pool.cpu()[rest], before[rest])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rope_is_that_of_the_models(dtype):
    row, cos, sin, nodes, keys, values, _, _ = make_rows("grouped", dtype, False)
    q, k, v = row.view(5, -1, 16).transpose(0, 1)[None].split([6, 2, 2], 1)
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    query = ops.rope_write(row, cos, sin, nodes, keys, values)
    for got, want in ((query, q), (keys[nodes], k), (values[nodes], v)):
        torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_norms", [False, True], ids=["", "norms"])
def test_rope_and_write_of_strided_rows_of_a_lower_precision(has_norms):
    """As the product of bfloat16 copies under a float32 model gives them."""
    args = make_rows("grouped", torch.float32, has_norms)
    wide = draw(5, args[0].shape[1] + 3).bfloat16()
    args[0] = wide[:, 3:].float()
    args[1:3] = (torch.stack([x, x], 1)[:, 0] for x in args[1:3])
    want = written(ops.rope_write, args)
    args[0] = wide[:, 3:]
    there = [*on_device(args[:6]), args[6] and tuple(on_device(args[6])), EPS]
    for run, inputs in ((ops.rope_write, args), (write_by_triton, there)):
        for got, expected in zip(written(run, inputs), want, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("shape", ROWS | {"two_tiles": (2, 700)})
def test_gates_equal_the_reference(dtype, shape):
    rows, width = (ROWS | {"two_tiles": (2, 700)})[shape]
    row = draw(rows, 2 * width, dtype=dtype, scale=4)
    check_op(ops.silu_mul_row, ops._silu_mul_row_triton, plain.silu_mul_row, [row])
    wide = draw(rows, 2 * width + 5, dtype=dtype)[:, 5:]
    check_op(ops.silu_mul_row, ops._silu_mul_row_triton, plain.silu_mul_row, [wide])


def test_gates_far_out_are_finite():
    far = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4] + [1.0] * 5])
    for got in (ops.silu_mul_row(far), ops._silu_mul_row_triton(far.to(DEVICE)).cpu()):
        torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))


def test_opcheck():
    x, delta, weight = draw(5, 8).float(), draw(5, 8).float(), draw(8).float()
    opcheck(torch.ops.fastgfn.rms_norm.default, (x, weight, EPS))
    opcheck(torch.ops.fastgfn.add_rms_norm.default, (x, delta, weight, EPS))
    opcheck(torch.ops.fastgfn.silu_mul_row.default, (x,))
    for has_norms in (False, True):
        *args, norms, eps = make_rows("grouped", torch.float32, has_norms)
        opcheck(torch.ops.fastgfn.rope_write.default, (*args, *(norms or (None, None)), eps))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: ops.rms_norm(torch.ones(2, 1, 3), torch.ones(3), EPS),
            ValueError,
            r"x must be \(n, D\), got",
        ),
        (
            lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(4), EPS),
            ValueError,
            r"weight must be \(3,\), got",
        ),
        (
            lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(3).double(), EPS),
            TypeError,
            "weight must be torch.float32, got torch.float64",
        ),
        (
            lambda: ops.rms_norm(torch.ones(2, 3).long(), torch.ones(3), EPS),
            TypeError,
            "rms_norm: x must be floating point, got torch.int64",
        ),
        (
            lambda: ops.add_rms_norm(torch.ones(2, 3), torch.ones(1, 3), torch.ones(3), EPS),
            ValueError,
            r"add_rms_norm: delta must be \(2, 3\), got \(1, 3\)",
        ),
        (lambda: ops.silu_mul_row(torch.ones(2, 3)), ValueError, r"row must be \(n, 2 F\), got \(2, 3\)"),
        (lambda: ops.silu_mul_row(torch.ones(2, 4).long()), TypeError, "row must be floating point"),
        (
            lambda: ops._silu_mul_row_triton(torch.ones(2, 4).double()),
            TypeError,
            "silu_mul_row: input must be below float64 on CUDA, got torch.float64",
        ),
        (
            lambda: ops._rms_norm_triton(torch.ones(1, 16385), torch.ones(16385), EPS),
            ValueError,
            "rms_norm: x must be at most 16384 wide on CUDA, got 16385",
        ),
    ],
)
def test_norms_and_gates_refuse(run, error, message):
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("at", "change", "error", "message"),
    [
        (0, lambda x: x[:, :-1], ValueError, r"row must be \(n, \(H \+ 2 \* 2\) \* 16\) of even head width"),
        (0, lambda x: x[:, :64], ValueError, r"row must be .*, got \(5, 64\); pass the products"),
        (1, lambda x: x[:, :8], ValueError, r"cos must be \(5, 16\), got \(5, 8\)"),
        (2, lambda x: x[:4], ValueError, r"sin must be \(5, 16\), got \(4, 16\)"),
        (3, lambda x: x[:4], ValueError, r"nodes must be \(5,\), got \(4,\)"),
        (5, lambda x: x[:, :1], ValueError, r"values must be \(9, 2, 16\), got \(9, 1, 16\)"),
        (5, lambda x: x.double(), TypeError, "values must be torch.float32, got torch.float64"),
        (6, lambda x: (x[0], x[1][:8]), ValueError, r"norms must be \(16,\), got \(8,\)"),
    ],
)
def test_rope_and_write_refuse(at, change, error, message):
    args = make_rows("grouped", torch.float32, True)
    args[at] = change(args[at])
    with pytest.raises(error, match=message):
        ops.rope_write(*args)
