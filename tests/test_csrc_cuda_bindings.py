"""The torch bindings of csrc/cuda on the host: built with the kernels against tests/cuda_on_host and
registered for CPU tensors under another name, every op must equal its C++ twin. Checks, strides, scratch and
argument order are tested here; test_csrc_cuda_on_host.py tests the kernels in depth.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import fastgfn._C  # noqa: F401
from fastgfn.ops import scan, tree
from fastgfn.types import as_int64

TESTS = Path(__file__).resolve().parent
CUDA = TESTS.parent / "csrc" / "cuda"
NAMES = """tree_cumsum subtree_sum segment_cumsum path_nodes gather_nodes scatter_add_nodes decode_update_
subtb_tree subtb_tree_backward subtb_tree_pairs subtb_padded subtb_padded_backward""".split()

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The namespace torch.ops.fastgfn_on_host."""
    folder = tmp_path_factory.mktemp("bindings")
    registered = "TORCH_LIBRARY_IMPL(fastgfn, CUDA, m)"
    source = folder / "bindings.cpp"
    text = "".join(path.read_text() for path in sorted(CUDA.glob("*.cpp")))
    assert text.count(registered) == len(list(CUDA.glob("*.cu")))
    text = text.replace(registered, "TORCH_LIBRARY_IMPL(fastgfn_on_host, CPU, m)")
    source.write_text(text.replace('#include "../', f'#include "{CUDA.parent}/'))
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{folder}" for folder in [TESTS / "cuda_on_host", *include_paths()]]
    command += [
        "-x",
        "c++",
        *map(str, [source, *sorted(CUDA.glob("*.cu"))]),
        "-x",
        "none",
        fastgfn._C.__file__,
    ]
    command += [f"-L{folder}" for folder in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    run = subprocess.run(
        [*command, "-o", str(folder / "twins.so")], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    library = torch.library.Library("fastgfn_on_host", "DEF")
    for name in NAMES:
        schema = str(getattr(torch.ops.fastgfn, name).default._schema)
        library.define(schema.removeprefix("fastgfn::"))
    torch.ops.load_library(str(folder / "twins.so"))
    yield torch.ops.fastgfn_on_host
    library._destroy()


def strided(tensor):
    """The same values, every second column of a wider buffer."""
    wide = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
    return wide[..., 0]


def forest():
    """(parent, leaf) of three small trees; a leaf appears twice."""
    parent = torch.tensor([-1, 0, 1, 2, 1, 4, 5, 4, 0, -1, 9, 10, 10, 9, -1], dtype=torch.int32)
    return parent, as_int64([3, 6, 7, 8, 8, 11, 12, 13, 14])


def cases(dtype):
    """{name: [arguments]}, of every layout that an op takes."""
    parent, leaf = forest()
    size = len(parent)
    depth = scan.tree_cumsum(torch.ones(size, dtype=torch.int64), parent)
    path = tree.path_nodes(parent, leaf, depth[leaf], 6)
    values, flow = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    edges, grad = torch.randn(path.shape, dtype=dtype), torch.randn((), dtype=dtype)
    valid, weight = torch.rand(size) < 0.7, torch.randint(0, 4, (size,)).float()
    nodes = (strided(values), flow, parent.long(), strided(valid), weight, 0.9)
    rows = torch.randn(5, 7, dtype=dtype), strided(torch.randn(5, 8, dtype=dtype)), torch.randint(0, 8, (5,))
    offsets = as_int64([0, 0, 4, 15])
    return {
        "tree_cumsum": [(values, parent), (strided(values), strided(parent)), (values[:0], parent[:0])],
        "subtree_sum": [(values, parent), (strided(values), strided(parent)), (values[:0], parent[:0])],
        "segment_cumsum": [(strided(values), strided(offsets), False), (values, offsets, True)],
        "path_nodes": [
            (strided(parent), strided(leaf), strided(depth[leaf]), 6),
            (parent, leaf[:0], leaf[:0], 0),
        ],
        "gather_nodes": [(strided(values), path), (values.int(), path), (valid, path), (values, path[:0])],
        "scatter_add_nodes": [(edges, path, size), (strided(edges), path, size), (edges[:0], path[:0], 3)],
        "subtb_tree": [nodes, (values[:0], flow[:0], parent[:0], valid[:0], weight[:0], 0.9)],
        "subtb_tree_backward": [(grad, *nodes), (grad, values, flow, parent, valid, weight, 0.0)],
        "subtb_tree_pairs": [(parent, valid, 0.5), (parent.long(), strided(valid), 0.5)],
        "subtb_padded": [(*rows, 0.9), (rows[0], rows[1], rows[2].int(), 0.0)],
        "subtb_padded_backward": [(torch.randn(5, dtype=dtype), *rows, 0.9)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "decode_update_"])
def test_the_binding_equals_the_cpu_op(twins, name, dtype):
    for arguments in cases(dtype)[name]:
        have, want = (getattr(ops, name)(*arguments) for ops in (twins, torch.ops.fastgfn))
        have, want = ((x,) if isinstance(x, torch.Tensor) else x for x in (have, want))
        for a, b in zip(have, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 1e-6, atol=1e-12)


def test_decode_update(twins):
    for ops, rows in ((torch.ops.fastgfn, [2, 0]), (twins, [2, 1, 0, 9])):
        buffer, lengths = torch.zeros(3, 5, dtype=torch.int64), strided(as_int64([0, 0, 1]))
        finished = strided(torch.tensor([False, True, False]))
        drawn = as_int64([7, 3] if ops is torch.ops.fastgfn else [7, 7, 3, 7])
        ops.decode_update_(buffer[:, 1:4], lengths, finished, drawn, as_int64(rows), 3, 2)
        assert buffer.tolist() == [[0] * 5, [0] * 5, [0, 0, 7, 0, 0]]
        assert lengths.tolist() == [0, 0, 2] and finished.tolist() == [True, True, True]


def test_a_gather_out_of_range_is_nan(twins):
    for dtype in (torch.float32, torch.float64):
        assert twins.gather_nodes(torch.ones(2, dtype=dtype), as_int64([2, -2])).isnan().all()
    assert twins.gather_nodes(as_int64([5, 6]), as_int64([2, 1])).tolist() == [0, 6]


@pytest.mark.parametrize("name", NAMES)
def test_the_binding_refuses_what_the_cpu_op_refuses(twins, name):
    """Dtypes and shapes, with the same message."""
    ones, parent = torch.ones(3), torch.tensor([-1, 0, 1], dtype=torch.int32)
    index, mask = as_int64([0, 1, 2]), torch.ones(3, dtype=torch.bool)
    bad = {
        "tree_cumsum": (ones.half(), parent),
        "subtree_sum": (ones, parent.long()),
        "segment_cumsum": (ones, index.int(), False),
        "path_nodes": (parent, index, index[:2], 3),
        "gather_nodes": (torch.ones(3, 2), index),
        "scatter_add_nodes": (ones, index[:2], 3),
        "decode_update_": (index[:, None], index, mask, index, index, 3, 2),
        "subtb_tree": (ones, ones, parent, mask, ones, 1.5),
        "subtb_tree_backward": (ones, ones, ones, parent, mask, ones, 0.5),
        "subtb_tree_pairs": (parent, ones, 0.5),
        "subtb_padded": (ones[None], ones[None], index[:1], 0.5),
        "subtb_padded_backward": (ones, ones[None], torch.ones(1, 4), index[:1], 0.5),
    }[name]
    messages = []
    for ops in (torch.ops.fastgfn, twins):
        with pytest.raises(ValueError, match=" must be .*; ") as caught:
            getattr(ops, name)(*bad)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1] and messages[0].startswith(f"{name}: ")
