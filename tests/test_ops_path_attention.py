"""Path attention: csrc C++ on the CPU, and the Triton kernel in the interpreter or compiled on a GPU."""

import shutil

import pytest
import torch

from fastgfn.ops.path_attention import path_attention, path_attention_triton
from fastgfn.reference import attention as plain
from fastgfn.testing import assert_close_to_truth

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_inputs(num_rows=5, capacity=40, longest=20, heads=6, kv_heads=2, width=16):
    length = torch.randint(1, longest + 1, (num_rows,))
    path = torch.randint(capacity, (num_rows, longest), dtype=torch.int32)
    query = torch.randn(num_rows, heads, width, dtype=torch.float64)
    pools = [torch.randn(capacity, kv_heads, width, dtype=torch.float64) for _ in range(2)]
    return [query, *pools, path, length]


def cast(inputs, dtype, device="cpu"):
    return [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]


def by_triton(query, keys, values, path, length, *, scale, softcap=None, window=None):
    return path_attention_triton(query, keys, values, path, length, scale, softcap or 0.0, window or 0)


SHAPES = {
    "grouped": {},
    "one_head_each": dict(heads=3, kv_heads=3, width=8),
    "wide_group": dict(heads=40, kv_heads=2, width=5),
    "one_node": dict(longest=1, capacity=1),
    "long": dict(longest=150, capacity=9, width=33),
    "head_of_256": dict(width=256, num_rows=2),
    "no_rows": dict(num_rows=0),
}


@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, window=7), dict(window=1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype, shape, options):
    inputs = make_inputs(**SHAPES[shape])
    rounded = cast(cast(inputs, dtype), torch.float64)
    truth = plain.path_attention(*rounded, scale=0.3, **options)
    naive = plain.path_attention(*cast(inputs, dtype), scale=0.3, **options)
    assert_close_to_truth("out", path_attention(*cast(inputs, dtype), scale=0.3, **options), naive, truth)
    if dtype != torch.float64:
        out = by_triton(*cast(inputs, dtype, DEVICE), scale=0.3, **options)
        assert out.dtype == dtype
        assert_close_to_truth("triton", out.cpu(), naive, truth)


def test_a_row_does_not_depend_on_the_others():
    inputs = cast(make_inputs(num_rows=9), torch.bfloat16)
    whole = path_attention(*inputs, scale=0.3)
    for r in range(9):
        query, keys, values, path, length = inputs
        alone = path_attention(query[r : r + 1], keys, values, path[r : r + 1], length[r : r + 1], scale=0.3)
        assert torch.equal(alone, whole[r : r + 1])


def test_strided_inputs():
    query, keys, values, path, length = make_inputs()
    want = path_attention(query, keys, values, path, length, scale=0.3)
    strided = torch.randn(5, 16, 6).double().transpose(1, 2).copy_(query)
    wide = torch.full((5, 40), -7, dtype=torch.int32)
    wide[:, ::2] = path
    assert torch.equal(path_attention(strided, keys, values, wide[:, ::2], length, scale=0.3), want)
    out = by_triton(*cast([strided, keys, values, path, length], torch.float32, DEVICE), scale=0.3)
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=1e-5)


def test_float64_is_for_the_cpu():
    with pytest.raises(
        TypeError, match="path_attention: query must be below float64 on CUDA, got torch.float64"
    ):
        by_triton(*make_inputs(), scale=0.3)


def test_opcheck():
    args = cast(make_inputs(), torch.float32)
    torch.library.opcheck(torch.ops.fastgfn.path_attention.default, (*args, 0.3, 0.0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[3].fill_(40), r"path must be nodes of the pool, got 40"),
        (lambda a: a[3].fill_(-1), r"path must be nodes of the pool, got -1"),
        (lambda a: a[4].fill_(0), r"length must be in \[1, W\], got 0"),
        (lambda a: a[4].fill_(21), r"length must be in \[1, W\], got 21"),
        (lambda a: a.__setitem__(1, a[1][:, :, :8]), r"keys and values must be \(C, Hkv, d\)"),
        (lambda a: a.__setitem__(2, a[2].float()), r"keys and values must be Double, got Double|Float"),
        (lambda a: a.__setitem__(3, a[3].long()), r"path must be Int, got Long"),
        (lambda a: a.__setitem__(4, a[4][:2]), r"path and length must be one row per query"),
    ],
)
def test_refuses_what_it_would_read_wrongly(change, message):
    inputs = make_inputs()
    change(inputs)
    with pytest.raises(ValueError, match=message):
        path_attention(*inputs, scale=0.3)
