"""Path attention: csrc C++ on the CPU, and the Triton kernel in the interpreter or compiled on a GPU."""

import shutil

import pytest
import torch

from fastgfn.kernels import path_attention as kernels
from fastgfn.ops.path_attention import SharedPrompts, path_attention, path_attention_triton
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


def by_triton(query, keys, values, path, length, *, scale, softcap=None, window=None, shared=None):
    options = scale, softcap or 0.0, window or 0
    shared = [] if shared is None else [x.to(query.device) for x in shared]
    return path_attention_triton(query, keys, values, path, length, *options, *shared)


def share(inputs, depths, sizes, columns=4, empty=1):
    """Prompts of these depths, each for as many rows in any order, own parts of 1 node and more; rows left
    over share nothing. Some tiles are empty, also in between."""
    path, length = inputs[3:]
    rows, tiles = torch.randperm(len(path)), []
    depth = torch.zeros_like(length)
    for nodes, size in zip(depths, sizes, strict=True):
        own, rows = rows[:size], rows[size:]
        path[own, :nodes] = path[own[0], :nodes].clone()
        length[own] = length[own].clamp(min=nodes + 1)
        length[own[-1]] = nodes + 1
        depth[own] = nodes
        tiles += [*own.split(columns), *[own[:0]] * empty]
    table = torch.full((len(tiles), columns), -1, dtype=torch.int32)
    for line, own in zip(table, tiles, strict=True):
        line[: len(own)] = own.int()
    return SharedPrompts(table, depth)


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


# Prompts of 1, 2, R and R + 1 rows, of a node, of whole tiles of nodes and others, several and one split.
SHARED = {
    "one_split": (dict(num_rows=13, heads=2, kv_heads=2, longest=60), (1, 40, 16, 5), (1, 2, 4, 5)),
    "splits": (dict(num_rows=6, longest=300, capacity=90, heads=3, kv_heads=1), (270, 130), (3, 2)),
    "equal_splits": (dict(num_rows=5, longest=200, capacity=90, width=5), (128, 64), (2, 2)),
    "pairs": (dict(num_rows=9, longest=70, heads=4, kv_heads=2, width=33), (65, 64), (5, 4)),
    "eight": (dict(num_rows=7, longest=70, heads=8, kv_heads=1, width=64), (50,), (6,)),
    "wide_group": (dict(num_rows=9, longest=40, heads=40, kv_heads=2, width=5), (33, 4), (5, 3)),
    "head_of_128": (dict(num_rows=5, longest=40, heads=2, kv_heads=2, width=128), (33,), (5,)),
    "head_of_160": (dict(num_rows=5, longest=90, heads=4, kv_heads=2, width=160), (70,), (4,)),
    "head_of_512": (dict(num_rows=3, longest=40, heads=1, kv_heads=1, width=512), (33,), (2,)),
    "no_tiles": (dict(), (), ()),
}


@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, window=45), dict(window=1)], ids=str)
@pytest.mark.parametrize("shape", SHARED)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_shared_prompts_change_nothing_but_rounding(dtype, shape, options, monkeypatch):
    """What is not written must not be read: memory is full of nan."""
    sizes, depths, counts = SHARED[shape]
    inputs = make_inputs(**sizes)
    shared = share(inputs, depths, counts)
    rounded = cast(cast(inputs, dtype), torch.float64)
    truth = plain.path_attention(*rounded, scale=0.3, **options)
    naive = plain.path_attention(*cast(inputs, dtype), scale=0.3, **options)
    got = path_attention(*cast(inputs, dtype), scale=0.3, shared=shared, **options)
    assert torch.equal(got, path_attention(*cast(inputs, dtype), scale=0.3, **options))
    assert_close_to_truth("out", got, naive, truth)
    if dtype != torch.float64:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
        args = cast(inputs, dtype, DEVICE)
        out = by_triton(*args, scale=0.3, shared=shared, **options)
        assert out.dtype == dtype
        assert_close_to_truth("triton", out.cpu(), naive, truth)
        assert torch.equal(out, by_triton(*args, scale=0.3, shared=shared, **options))


def test_splits_of_the_tests():
    """One for short paths, more for few long ones, two for 256 rows, one where these fill the device."""

    def splits(num_rows, path, kv_heads=8, group=4, width=64):
        return kernels.shared_constants(num_rows, 16, kv_heads, group, width, path, 2)["NUM_SPLITS"]

    assert [splits(*x) for x in ((13, 60, 2), (6, 300, 1), (5, 200, 2))] == [1, 4, 3]
    assert [splits(*x) for x in ((256, 230), (64, 230), (512, 230), (20, 4000, 1))] == [2, 3, 1, 16]


def test_a_shared_row_does_not_depend_on_those_of_other_tiles():
    inputs = make_inputs(num_rows=9, longest=90)
    shared = share(inputs, (70, 70), (4, 4))
    args = cast(inputs, torch.float32, DEVICE)
    want = by_triton(*args, scale=0.3, shared=shared)
    other = shared.tiles[shared.tiles[:, 0] >= 0][1]
    args[0][other[other >= 0].long()] = 0.0
    got = by_triton(*args, scale=0.3, shared=shared)
    same = shared.tiles[shared.tiles[:, 0] >= 0][0].long()
    assert torch.equal(got[same], want[same]) and not torch.equal(got, want)


def test_strided_tiles():
    inputs = make_inputs(num_rows=6)
    shared = share(inputs, (9,), (5,))
    args = cast(inputs, torch.float32, DEVICE)
    want = by_triton(*args, scale=0.3, shared=shared)
    wide = torch.full((len(shared.tiles), 8), 77, dtype=torch.int32)
    wide[:, ::2] = shared.tiles
    strided = SharedPrompts(wide[:, ::2], torch.stack([shared.depth, shared.depth], 1)[:, 0])
    assert torch.equal(by_triton(*args, scale=0.3, shared=strided), want)
    assert torch.equal(path_attention(*inputs, scale=0.3, shared=strided), path_attention(*inputs, scale=0.3))


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
    shared = share(args, (9,), (5,))
    torch.library.opcheck(torch.ops.fastgfn.path_attention.default, (*args, 0.3, 0.0, 0, *shared))


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


def replaced(tensor, at, value):
    return tensor.clone().index_put_(
        tuple(torch.tensor([i]) for i in at), torch.tensor(value, dtype=tensor.dtype)
    )


TWICE = "tiles must be rows, each once, then -1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: (replaced(t, (0, 2), 0), d), f"{TWICE}, got 0"),
        (lambda t, d: (replaced(t, (1, 0), 5), d), f"{TWICE}, got 5"),
        (lambda t, d: (replaced(t, (0, 0), -1), d), f"{TWICE}, got 1"),
        (lambda t, d: (replaced(t, (0, 1), -2), d), f"{TWICE}, got -2"),
        (lambda t, d: (replaced(t, (0, 1), -1), d), "depth must be 0 for a row of no tile, got 3"),
        (lambda t, d: (t, replaced(d, (1,), 2)), r"depth must be in \[1, length\], one number .* got 2"),
        (lambda t, d: (t, d * 7), r"depth must be in \[1, length\], one number .* got 21"),
        (lambda t, d: (t, d * 0), r"depth must be in \[1, length\], one number .* got 0"),
        (lambda t, d: (t, d + d), "tiles must be rows whose first depth nodes are the same, got 1"),
        (lambda t, d: (t.long(), d), r"tiles must be \(T, R\) int32"),
        (lambda t, d: (t[0], d), r"tiles must be \(T, R\) int32"),
        (lambda t, d: (t, d.int()), r"depth must be \(n,\) int64"),
        (lambda t, d: (t, d[:2]), r"depth must be \(n,\) int64"),
        (lambda t, d: (t, None), "tiles and depth must be both or neither"),
    ],
)
def test_refuses_tiles_that_do_not_fit(change, message):
    inputs = make_inputs()
    path, length = inputs[3:]
    length.fill_(10)
    path[:] = torch.arange(path.numel()).view_as(path) % 40
    path[1, :3] = path[0, :3]
    tiles = torch.tensor([[0, 1, -1], [-1, -1, -1]], dtype=torch.int32)
    shared = tiles, torch.tensor([3, 3, 0, 0, 0])
    path_attention(*inputs, scale=0.3, shared=SharedPrompts(*shared))
    with pytest.raises(ValueError, match=message):
        path_attention(*inputs, scale=0.3, shared=SharedPrompts(*change(*shared)))
