"""The CUDA kernels of csrc run on the host, compiled from the same .cu files against tests/cuda_on_host.

What the .cu files compute, their grids and the order of their sums is tested here; what only a device has
(the torch bindings, streams, graphs) is tested by the gpu tests of test_csrc_cuda.py.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastgfn.ops import scan as scan_ops
from fastgfn.ops import subtb as subtb_ops
from fastgfn.ops import tree as tree_ops
from fastgfn.ops.decode import decode_update_
from fastgfn.reference import subtb as subtb_reference
from fastgfn.testing import assert_close_to_truth
from fastgfn.types import as_int64

TESTS = Path(__file__).resolve().parent
SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.int64: "i64"}
GUARD = 64
STOP = 3

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def argument(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return {float: ctypes.c_double, bool: ctypes.c_bool}.get(type(value), ctypes.c_int64)(value)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """call(name, *arguments) of the library's launchers; the stream is added."""
    library = tmp_path_factory.mktemp("csrc") / "kernels.so"
    sources = sorted((TESTS.parent / "csrc" / "cuda").glob("*.cu"))
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-shared", "-fPIC", f"-I{TESTS / 'cuda_on_host'}", "-x", "c++", *map(str, sources)]
    run = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    loaded = ctypes.CDLL(str(library))

    def call(name, *arguments):
        getattr(loaded, f"fastgfn_{name}")(*map(argument, arguments), None)

    return call


class Guarded:
    """Outputs full of a poison value, with guard zones around them that must not change."""

    def __init__(self):
        self.buffers = []

    def empty(self, shape, dtype, poison=77):
        size, poison = torch.Size(shape).numel(), True if dtype == torch.bool else poison
        buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype)
        self.buffers.append((buffer, size, poison))
        return buffer[GUARD : GUARD + size].view(shape)

    def check(self):
        for buffer, size, poison in self.buffers:
            outside = torch.cat([buffer[:GUARD], buffer[GUARD + size :]])
            assert bool((outside == poison).all())


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def forest(num_nodes, seed=0, descend=0.75):
    """Depth-first parents: each node hangs off a node of the path to the one before it, or is a root."""
    generator = torch.Generator().manual_seed(seed)
    parent, path = [], []
    for i in range(num_nodes):
        if torch.rand((), generator=generator) >= descend:
            path = path[: int(torch.randint(len(path) + 1, (), generator=generator))]
        parent.append(path[-1] if path else -1)
        path.append(i)
    return torch.tensor(parent, dtype=torch.int32)


# One node, single warps and blocks with a partial last one, a forest of roots, a chain over several warps.
FORESTS = {
    "empty": forest(0),
    "one": forest(1),
    "small": forest(33),
    "wide": forest(300, descend=0.1),
    "deep": forest(515, seed=1, descend=0.97),
    "roots": torch.full((70,), -1, dtype=torch.int32),
    "chain": torch.arange(-1, 199, dtype=torch.int32),
}
each_forest = pytest.mark.parametrize("parent", FORESTS.values(), ids=FORESTS)
each_dtype = pytest.mark.parametrize("dtype", SUFFIX, ids=str)


def random_values(size, dtype):
    """(size,) with stride 2."""
    wide = torch.randn(size, 2, dtype=torch.float64) * 10
    return wide.to(dtype)[:, 1]


def assert_same(have, want):
    """Equal integers; floats within the rounding of a sum in another order (float32 sums are in double)."""
    if have.dtype == torch.int64:
        assert torch.equal(have, want)
    else:
        epsilon = torch.finfo(have.dtype).eps
        torch.testing.assert_close(
            have, want, rtol=(2 if have.dtype == torch.float32 else 64) * epsilon, atol=1e-12
        )


@each_dtype
@each_forest
def test_tree_cumsum(kernels, guarded, parent, dtype):
    values = random_values(len(parent), dtype)
    out = guarded.empty(parent.shape, dtype)
    kernels(f"tree_cumsum_{SUFFIX[dtype]}", values, values.stride(0), parent, len(parent), out)
    assert_same(out, scan_ops.tree_cumsum(values, parent))


def subtree_sum(kernels, guarded, values, parent):
    out, end = guarded.empty(parent.shape, values.dtype), guarded.empty(parent.shape, torch.int32)
    name = f"subtree_sum_{SUFFIX[values.dtype]}"
    kernels(name, values, values.stride(0), parent, len(parent), end, out)
    return out, end


@each_dtype
@each_forest
def test_subtree_sum(kernels, guarded, parent, dtype):
    values = random_values(len(parent), dtype)
    out, end = subtree_sum(kernels, guarded, values, parent)
    assert_same(out, scan_ops.subtree_sum(values, parent))
    ones = torch.ones(len(parent), dtype=torch.int64)
    assert torch.equal(end.long(), torch.arange(len(parent)) + scan_ops.subtree_sum(ones, parent))


def test_float32_sums_in_double(kernels, guarded):
    parent, values = torch.arange(-1, 3999, dtype=torch.int32), torch.full((4000,), 0.1)
    exact = values.double().cumsum(0).float()
    out = guarded.empty((4000,), torch.float32)
    kernels("tree_cumsum_f32", values, 1, parent, 4000, out)
    assert torch.equal(out, exact)
    assert torch.equal(subtree_sum(kernels, guarded, values, parent)[0].flip(0), exact)
    kernels("segment_cumsum_f32", values, 1, 4000, as_int64([0, 4000]), 1, 1, False, out)
    assert torch.equal(out, exact)


# No row, empty rows, rows below, at and above one warp's 32 entries, more rows than one block has warps.
@each_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 1, 32, 0, 33, 100, 64], [5] * 9], ids=str)
def test_segment_cumsum(kernels, guarded, lengths, reverse, dtype):
    offsets = torch.nn.functional.pad(as_int64(lengths).cumsum(0), (1, 0))
    values = random_values(int(offsets[-1]), dtype)
    out = guarded.empty(values.shape, dtype)
    shape = (values.stride(0), len(values), offsets, 1, len(lengths))
    kernels(f"segment_cumsum_{SUFFIX[dtype]}", values, *shape, reverse, out)
    assert_same(out, scan_ops.segment_cumsum(values, offsets, reverse))


TYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gather_nodes(kernels, guarded, dtype):
    values = torch.randint(0, 100, (50, 3)).to(dtype)[:, 1]
    index = torch.randint(-1, 50, (13, 11))
    size = values.element_size()
    out = guarded.empty(index.shape, dtype)
    kernels(f"gather_nodes_{size}", values, values.stride(0), 50, index, index.numel(), 0, out)
    assert torch.equal(out, tree_ops.gather_nodes(values, index))
    nan = torch.tensor([torch.nan]).view(torch.int32).item()
    wild, out = as_int64([-2, 50, 2**40, 3]), guarded.empty((4,), torch.float32)
    kernels("gather_nodes_4", torch.arange(50.0), 1, 50, wild, 4, nan, out)
    assert out[:3].isnan().all() and out[3] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_runs_is_scatter_add(kernels, guarded, dtype):
    index = torch.randint(-1, 9, (20, 30))
    index[index == 4] = 5  # a node without entries
    grad = torch.randn(20, 30, dtype=dtype)
    node, order = index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(node, torch.arange(10))
    out = guarded.empty((9,), dtype)
    kernels(f"sum_runs_{SUFFIX[dtype]}", grad, order, offsets, 9, out)
    assert_same(out, tree_ops.scatter_add_nodes(grad, index, 9))


@each_forest
def test_path_nodes(kernels, guarded, parent):
    depth = scan_ops.tree_cumsum(torch.ones(len(parent), dtype=torch.int64), parent)
    leaf = torch.randint(max(1, len(parent)), (140 if len(parent) else 0,))
    wanted = (torch.rand(len(leaf)) * (depth[leaf] + 1)).long()
    width = int(wanted.max()) + 2 if len(leaf) else 0
    out = guarded.empty((len(leaf), width), torch.int64)
    kernels("path_nodes", parent, len(parent), leaf, wanted, len(leaf), width, out)
    assert torch.equal(out, tree_ops.path_nodes(parent, leaf, wanted, width))


def test_a_path_past_its_root_reads_minus_one(kernels, guarded):
    out = guarded.empty((3, 4), torch.int64)
    leaf, wanted = as_int64([1, 7, 0]), as_int64([4, 9, -5])
    kernels("path_nodes", torch.tensor([-1, 0], dtype=torch.int32), 2, leaf, wanted, 3, 4, out)
    assert out.tolist() == [[-1, -1, 0, 1], [-1] * 4, [-1] * 4]


def decode_arguments(tokens, lengths, finished, drawn, rows, max_length):
    state = (tokens, *tokens.stride(), lengths, lengths.stride(0), finished, finished.stride(0), len(tokens))
    return (*state, drawn, drawn.stride(0), rows, rows.stride(0), len(drawn), STOP, max_length)


@pytest.mark.parametrize("every_row", [False, True], ids=["active_rows", "every_row"])
def test_decode_update(kernels, every_row):
    """Finished rows may be passed again: a decoding graph has static shapes."""

    def state():
        zeros = torch.zeros(150, 12, dtype=torch.int64)
        return zeros[:, 1:9], zeros[:, 10], torch.zeros(150, 2, dtype=torch.bool)[:, 1]

    have, want = state(), state()
    for _ in range(8):
        active = (~want[2]).nonzero()[:, 0]
        token = torch.randint(0, STOP + 4, (150,))
        rows = torch.randperm(150) if every_row else active[torch.randperm(len(active))]
        drawn = torch.stack([token[rows], token[rows]], 1)[:, 1]
        kernels("decode_update", *decode_arguments(*have, drawn, rows, 8))
        decode_update_(*want, token[active], active, STOP, 8)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert have[2].all() and int(have[1].max()) == 8


def test_decode_update_leaves_bad_rows_alone(kernels):
    tokens, lengths = torch.zeros(3, 2, dtype=torch.int64), as_int64([0, 2, -1])
    finished = torch.zeros(3, dtype=torch.bool)
    rows, drawn = as_int64([0, 1, 2, 3, -1]), as_int64([9] * 5)
    kernels("decode_update", *decode_arguments(tokens, lengths, finished, drawn, rows, 2))
    assert tokens.tolist() == [[9, 0], [0, 0], [0, 0]] and lengths.tolist() == [1, 2, -1]
    assert not finished.any()


def subtb_tree(kernels, guarded, log_pf, log_flow, parent, valid, weight, subtb_lambda):
    """(value, grad_log_pf, grad_log_flow) at an upstream gradient of 0.5, as the binding computes them."""
    suffix, size = SUFFIX[log_pf.dtype], len(parent)
    inputs = (log_pf, log_flow, parent, valid, weight.double(), subtb_lambda, size)
    terms = guarded.empty((size,), torch.float64)
    kernels(f"subtb_tree_fwd_{suffix}", *inputs, terms)
    doubles = guarded.empty((3, size), torch.float64, torch.inf)
    ints = guarded.empty((2, size), torch.int32)
    grads = [guarded.empty((size,), log_pf.dtype) for _ in range(2)]
    upstream = torch.tensor(0.5, dtype=torch.float64)
    kernels(f"subtb_tree_bwd_{suffix}", *inputs, upstream, doubles, ints, *grads)
    return terms.sum().to(log_pf.dtype), *grads


def subtb_inputs(parent, valid_rate, dtype=torch.float64):
    size = len(parent)
    valid = torch.rand(size) < valid_rate
    log_flow = torch.where(valid, torch.randn(size) * 100, torch.nan).to(dtype)
    weight = torch.where(valid, torch.randint(0, 4, (size,)), torch.nan)
    return (-torch.rand(size)).to(dtype), log_flow, parent, valid, weight


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("valid_rate", [0.0, 0.6, 1.0])
@each_forest
def test_subtb_tree_equals_the_cpu(kernels, guarded, parent, valid_rate, subtb_lambda):
    inputs = subtb_inputs(parent, valid_rate)
    have = subtb_tree(kernels, guarded, *inputs, subtb_lambda)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    value = subtb_ops.subtb_tree(*leaves, *inputs[2:], subtb_lambda)
    want = (value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(0.5, dtype=torch.float64)))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * float(b.abs().max()) if b.numel() else 0)
    pairs = guarded.empty(parent.shape, torch.float64)
    kernels("subtb_tree_pairs", parent, inputs[3], subtb_lambda, len(parent), pairs)
    torch.testing.assert_close(
        pairs, subtb_ops.subtb_tree_pairs(parent, inputs[3], subtb_lambda), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.9, 1.0])
def test_subtb_tree_equals_the_reference(kernels, guarded, subtb_lambda):
    """In float32, by the rule of all ops, against the quadratic reference."""
    inputs = subtb_inputs(forest(60), 0.7, torch.float32)
    have = subtb_tree(kernels, guarded, *inputs, subtb_lambda)
    results = []
    for dtype in (torch.float32, torch.float64):
        pf, flow, weight = (inputs[k].nan_to_num(0).to(dtype) for k in (0, 1, 4))
        leaves = [pf.requires_grad_(), flow.requires_grad_()]
        value = subtb_reference.subtb_tree(*leaves, *inputs[2:4], weight, subtb_lambda)
        results.append((value.detach(), *torch.autograd.grad(0.5 * value, leaves)))
    for name, fused, naive, truth in zip(("loss", "pf", "flow"), have, *results, strict=True):
        assert_close_to_truth(name, fused, naive, truth, grad=name != "loss")


def test_subtb_tree_reads_no_unused_entry(kernels, guarded):
    """As test_ops_subtb.test_unused_entries_may_be_nan."""
    nan = torch.nan
    parent = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32)
    valid = torch.tensor([False, True, False, True, False])
    log_pf = torch.tensor([nan, nan, 1.0, 2.0, nan])
    log_flow, weight = torch.tensor([nan, 4.0, nan, 3.0, nan]), torch.tensor([nan, 1.0, nan, 2.0, nan])
    value, *grads = subtb_tree(kernels, guarded, log_pf, log_flow, parent, valid, weight, 0.5)
    assert value.item() == 32.0
    assert grads[0].tolist() == [0, 0, 8, 8, 0] and grads[1].tolist() == [0, 8, 0, -8, 0]


def test_wild_parents_stay_inside_the_arrays(kernels, guarded):
    """Parents that are no depth-first order end the walks; the guards around every output stay whole."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parent = torch.randint(-40, 80, (70,), generator=generator, dtype=torch.int32)
        out, values = guarded.empty((70,), torch.float64), torch.ones(70, dtype=torch.float64)
        kernels("tree_cumsum_f64", values, 1, parent, 70, out)
        subtree_sum(kernels, guarded, values, parent)
        subtb_tree(kernels, guarded, *subtb_inputs(parent, 0.7), 0.9)
        kernels("subtb_tree_pairs", parent, parent < 9, 0.9, 70, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("subtb_lambda", [0.0, 0.9])
def test_subtb_padded_equals_the_cpu(kernels, guarded, dtype, subtb_lambda):
    lengths, width = torch.randint(0, 13, (70,)), 12
    log_pf = torch.randn(width, 70, dtype=dtype).T
    log_flow = torch.randn(70, width + 1, 2, dtype=dtype)[..., 1]
    rows = (log_pf, *log_pf.stride(), log_flow, *log_flow.stride(), lengths, 70, width, subtb_lambda)
    num, den = guarded.empty((70,), dtype), guarded.empty((70,), dtype)
    kernels(f"subtb_padded_fwd_{SUFFIX[dtype]}", *rows, num, den)
    want = subtb_ops.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    assert torch.equal(num, want[0]) and torch.equal(den, want[1])
    grad = torch.randn(70, dtype=torch.float64)
    pf, flow = guarded.empty((70, width), dtype), guarded.empty((70, width + 1), dtype)
    kernels(f"subtb_padded_bwd_{SUFFIX[dtype]}", *rows, grad, pf, flow)
    want = torch.ops.fastgfn.subtb_padded_backward(grad, log_pf, log_flow, lengths, subtb_lambda)
    assert torch.equal(pf, want[0]) and torch.equal(flow, want[1])
    lengths[3], lengths[5] = 13, -1
    kernels(f"subtb_padded_fwd_{SUFFIX[dtype]}", *rows, num, den)
    assert num.isnan().nonzero()[:, 0].tolist() == [3, 5]
