"""The CUDA half of csrc compiles without a GPU and without torch; on a GPU it equals the CPU half.

What the kernels compute is tested on the host by test_csrc_cuda_on_host.py.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils.cpp_extension import include_paths

from fastgfn.ops import scan, subtb, tree
from fastgfn.ops.decode import decode_update_
from fastgfn.types import as_int64

CSRC = Path(__file__).resolve().parent.parent / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
REGISTRATIONS = sorted((CSRC / "cuda").glob("*.cpp"))
ARCHITECTURES = ("80", "90", "100")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
each_kernel_file = pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)


def includes(path):
    """Every header that a source file reaches, as written; our own are followed."""
    found = []
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
        found.append(name)
        own = (path.parent / name).resolve()
        if own.is_file():
            found += includes(own)
    return found


def test_every_kernel_file_has_a_registration():
    assert KERNELS
    assert [f"{path.stem}_cuda.cpp" for path in KERNELS] == [path.name for path in REGISTRATIONS]


@each_kernel_file
def test_kernels_include_no_torch(source):
    found = includes(source)
    assert "cuda_runtime.h" in found
    assert not [name for name in found if re.match(r"(ATen|torch|c10)/", name) or name.endswith("checks.h")]


def test_the_include_test_can_fail():
    assert "ATen/ATen.h" in includes(REGISTRATIONS[0])


@each_kernel_file
def test_kernels_use_no_atomics(source):
    text = "".join(path.read_text() for path in (source, CSRC / "cuda" / "launch.h"))
    assert not re.search(r"atomic\w*\s*\(", text) and "Synchronize" not in text


@needs_nvcc
@each_kernel_file
def test_kernels_compile_without_spills(source, tmp_path):
    output = tmp_path / "kernel.o"
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["-Xptxas", "-v", str(source), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size > 0
    for arch in ARCHITECTURES:
        assert re.search(rf"Compiling entry function '\w+' for 'sm_{arch}'", run.stderr), run.stderr
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    usage = re.findall(pattern, run.stderr)
    assert usage and set(usage) == {("0", "0", "0")}, run.stderr


@needs_nvcc
def test_registrations_parse(tmp_path):
    """All as one source, which reads torch's headers once."""
    if torch.version.cuda is None:
        # A CPU build of torch ships its CUDA headers without this one, which only lists build options.
        macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.touch()
    everything = tmp_path / "everything.cpp"
    everything.write_text("".join(f'#include "{path}"\n' for path in REGISTRATIONS))
    # nvcc hands a .cpp file to the host compiler and adds the toolkit's headers.
    command = ["nvcc", "-c", "-std=c++20", "-Xcompiler", "-fsyntax-only,-Wall", str(everything)]
    command += [f"-I{folder}" for folder in [tmp_path, *include_paths()]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def signatures(path):
    """{launcher: parameter types}, of the definitions of a .cu file or the declarations of a .cpp file."""
    text = path.read_text().replace("\\\n", " ")
    found = {}
    for name, parameters in re.findall(r"void (fastgfn_[\w#]+)\(([^)]*)\)", text):
        types = [p.strip() for p in parameters.split(",")]
        if path.suffix == ".cu":
            types = [re.sub(r"\w+$", "", t) for t in types]
        found[name] = ["".join(t.split()) for t in types]
    return found


def test_launchers_are_declared_as_they_are_defined():
    """extern "C" links by name alone, so a declaration that differs would only fail when called."""
    for source, registration in zip(KERNELS, REGISTRATIONS, strict=True):
        assert signatures(source) and signatures(registration) == signatures(source)


# On a GPU.


def forest(num_groups=3, rows=40, depth=9, vocab=3, seed=0):
    """(parent, leaf) of random trees in depth-first order; duplicate leaves included."""
    generator = torch.Generator().manual_seed(seed)
    parent, leaf = [], []
    for _ in range(num_groups):
        draw = torch.randint(vocab, (rows, depth), generator=generator).tolist()
        length = torch.randint(depth + 1, (rows,), generator=generator).tolist()
        keys = {()} | {tuple(d[:k]) for d, n in zip(draw, length, strict=True) for k in range(n + 1)}
        index = {key: len(parent) + i for i, key in enumerate(sorted(keys))}
        leaf += [index[tuple(d[:n])] for d, n in zip(draw, length, strict=True)]
        parent += [index[key[:-1]] if key else -1 for key in sorted(keys)]
    return torch.tensor(parent, dtype=torch.int32), as_int64(leaf)


def cases(dtype=torch.float64):
    """{name: (function, differentiable inputs, other inputs)}, all on the CPU."""
    torch.manual_seed(0)
    parent, leaf = forest()
    size = len(parent)
    depth = scan.tree_cumsum(torch.ones(size, dtype=torch.int64), parent)
    offsets = torch.nn.functional.pad(torch.randint(0, 80, (50,)).cumsum(0), (1, 0))
    path = tree.path_nodes(parent, leaf, depth[leaf], 12)
    valid = torch.rand(size) < 0.7
    values, flow = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    flat = torch.randn(int(offsets[-1]), dtype=dtype)
    weight = torch.randint(0, 4, (size,)).to(dtype)
    log_pf, log_flow = torch.randn(300, 40, dtype=dtype), torch.randn(300, 41, dtype=dtype)
    lengths = torch.randint(0, 41, (300,))
    return {
        "tree_cumsum": (scan.tree_cumsum, [values], [parent]),
        "subtree_sum": (scan.subtree_sum, [values], [parent]),
        "segment_cumsum": (scan.segment_cumsum, [flat], [offsets, False]),
        "segment_cumsum_reverse": (scan.segment_cumsum, [flat], [offsets, True]),
        "gather_nodes": (tree.gather_nodes, [values], [path]),
        "scatter_add_nodes": (tree.scatter_add_nodes, [torch.randn(path.shape, dtype=dtype)], [path, size]),
        "path_nodes": (tree.path_nodes, [], [parent, leaf, depth[leaf], 12]),
        "subtb_tree": (subtb.subtb_tree, [values, flow], [parent, valid, weight, 0.9]),
        "subtb_tree_pairs": (subtb.subtb_tree_pairs, [], [parent, valid, 0.9]),
        "subtb_padded": (subtb.subtb_padded, [log_pf, log_flow], [lengths, 0.9]),
        "subtb_pairwise": (subtb.subtb_pairwise, [log_pf, log_flow], [lengths, 0.9, "huber"]),
    }


NAMES = """tree_cumsum subtree_sum segment_cumsum segment_cumsum_reverse gather_nodes scatter_add_nodes
path_nodes subtb_tree subtb_tree_pairs subtb_padded subtb_pairwise""".split()
each_op = pytest.mark.parametrize("name", NAMES)


def test_every_case_is_tested():
    assert sorted(cases()) == sorted(NAMES)
    for function, leaves, rest in cases().values():
        assert all(x.isfinite().all() for x in value_and_grads(function, leaves, rest))


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def value_and_grads(function, leaves, rest):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, *rest)
    value = out[0] if isinstance(out, tuple) else out
    upstream = torch.ones_like(value).cumsum(0) if value.dim() else torch.ones_like(value)
    return value.detach(), *(torch.autograd.grad(value, leaves, upstream) if leaves else ())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_op
def test_cuda_equals_cpu_and_repeats_its_bits(name, dtype):
    function, leaves, rest = cases(dtype)[name]
    want = value_and_grads(function, leaves, rest)
    first, second = (
        value_and_grads(function, [x.cuda() for x in leaves], [on_gpu(x) for x in rest]) for _ in range(2)
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for have, again, truth in zip(first, second, want, strict=True):
        assert have.is_cuda and have.dtype == truth.dtype and torch.equal(have, again)
        scale = float(truth.double().abs().max())
        torch.testing.assert_close(have.cpu(), truth, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@each_op
def test_no_synchronisation(name):
    function, leaves, rest = cases()[name]
    leaves, rest = [x.cuda() for x in leaves], [on_gpu(x) for x in rest]
    value_and_grads(function, leaves, rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grads(function, leaves, rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_op
def test_graph_capture(name):
    """A graph replays the op, forward and backward, on new values in the same memory."""
    function, leaves, rest = cases()[name]
    leaves, rest = [x.cuda() for x in leaves], [on_gpu(x) for x in rest]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value_and_grads(function, leaves, rest)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_grads(function, leaves, rest)
    for leaf in leaves:
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    torch.cuda.synchronize()
    for have, want in zip(captured, value_and_grads(function, leaves, rest), strict=True):
        assert torch.equal(have, want)


@pytest.mark.gpu
@each_op
def test_opcheck_on_cuda(name):
    function, leaves, rest = cases()[name]
    op = getattr(torch.ops.fastgfn, name.removesuffix("_reverse")).default
    opcheck(op, (*(x.cuda().requires_grad_() for x in leaves), *(on_gpu(x) for x in rest)))


@pytest.mark.gpu
def test_integers_on_cuda():
    parent, _ = forest()
    values = torch.randint(-9, 9, (len(parent),))
    for op in (scan.tree_cumsum, scan.subtree_sum):
        assert torch.equal(op(values.cuda(), parent.cuda()).cpu(), op(values, parent))
    index = torch.randint(-1, len(parent), (70, 3))
    for kind in (torch.int8, torch.int16, torch.int32, torch.int64, torch.bool):
        got = tree.gather_nodes(values.to(kind).cuda(), index.cuda())
        assert torch.equal(got.cpu(), tree.gather_nodes(values.to(kind), index))


@pytest.mark.gpu
def test_decode_update_on_cuda():
    """Every row in every step, in a graph; the CPU gets the active rows only."""
    shapes = ((300, 20), torch.int64), ((300,), torch.int64), ((300,), torch.bool)
    have = [torch.zeros(s, dtype=d, device="cuda") for s, d in shapes]
    want = [torch.zeros(s, dtype=d) for s, d in shapes]
    drawn = torch.zeros(300, dtype=torch.int64, device="cuda")
    every = torch.arange(300, device="cuda")
    decode_update_(*(x.clone() for x in have), drawn, every, 3, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_update_(*have, drawn, every, 3, 20)
    for _ in range(20):
        token = torch.randint(0, 40, (300,))
        drawn.copy_(token)
        graph.replay()
        active = (~want[2]).nonzero()[:, 0]
        decode_update_(*want, token[active], active, 3, 20)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(have, want, strict=True))
    assert want[2].all()


@pytest.mark.gpu
def test_refuses_two_devices():
    parent = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="tree_cumsum: parent must be on cuda:0, got cpu; move every"):
        scan.tree_cumsum(torch.ones(2, device="cuda"), parent)
    with pytest.raises(ValueError, match="gather_nodes: index must be on cuda:0, got cpu"):
        tree.gather_nodes(torch.ones(2, device="cuda"), as_int64([0]))
