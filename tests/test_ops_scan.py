import pytest
import torch
from torch.library import opcheck

from fastgfn.ops import scan as ops
from fastgfn.reference import scan as ref
from fastgfn.testing import assert_close_to_truth
from fastgfn.types import as_int64


def random_tree(num_nodes, seed=0):
    """Depth-first parents: each node hangs off a node of the path to the one before it, or is a root."""
    generator = torch.Generator().manual_seed(seed)
    parent, path = [], []
    for i in range(num_nodes):
        keep = int(torch.randint(len(path) + 1, (), generator=generator))
        if i and torch.rand((), generator=generator) < 0.6:
            keep = len(path)
        path = path[:keep]
        parent.append(path[-1] if path else -1)
        path.append(i)
    return torch.tensor(parent, dtype=torch.int32)


def ends(parent):
    end = torch.arange(1, len(parent) + 1)
    for i in reversed(range(len(parent))):
        if parent[i] >= 0:
            end[parent[i]] = torch.maximum(end[parent[i]], end[i])
    return end.tolist()


OFFSETS = as_int64([0, 0, 1, 8, 8, 20])
CASES = {
    "tree_cumsum": (ops.tree_cumsum, ref.tree_cumsum, (random_tree(20),)),
    "subtree_sum": (ops.subtree_sum, ref.subtree_sum, (random_tree(20),)),
    "segment_cumsum": (ops.segment_cumsum, ref.segment_cumsum, (OFFSETS,)),
    "segment_cumsum_reverse": (ops.segment_cumsum, ref.segment_cumsum, (OFFSETS, True)),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_equals_reference_with_gradients(case):
    op, reference, rest = CASES[case]
    truth_in = torch.randn(20, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(20, dtype=torch.float64)
    results = {}
    for name, function, dtype in (
        ("truth", reference, torch.float64),
        ("naive", reference, torch.float32),
        ("fused", op, torch.float32),
    ):
        values = truth_in.detach().to(dtype).requires_grad_()
        out = function(values, *rest)
        results[name] = (out.detach(), torch.autograd.grad(out, values, upstream.to(dtype))[0])
    for k, is_grad in enumerate((False, True)):
        fused, naive, truth = (results[n][k] for n in ("fused", "naive", "truth"))
        assert_close_to_truth(case, fused, naive, truth, grad=is_grad)
    assert torch.autograd.gradcheck(lambda v: op(v, *rest), truth_in)
    assert torch.autograd.gradgradcheck(lambda v: op(v, *rest).square(), truth_in)
    integers = torch.randint(-9, 9, (20,))
    assert torch.equal(op(integers, *rest), reference(integers, *rest))


def test_subtree_sum_is_the_sum_of_its_index_range():
    for seed in range(5):
        parent = random_tree(40, seed)
        values = torch.randint(-9, 9, (40,))
        want = [int(values[j:e].sum()) for j, e in enumerate(ends(parent))]
        assert ops.subtree_sum(values, parent).tolist() == want


def test_float32_accumulates_in_double():
    n = 100_000
    values = torch.full((n,), 0.1)
    chain = torch.arange(-1, n - 1, dtype=torch.int32)
    exact = values.double().cumsum(0)
    assert torch.equal(ops.tree_cumsum(values, chain), exact.float())
    assert torch.equal(ops.subtree_sum(values, chain).flip(0), exact.float())
    assert torch.equal(ops.segment_cumsum(values, as_int64([0, n])), exact.float())


# Empty input, one node, a forest of roots, a strided view.
@each_case
def test_odd_shapes(case):
    op, reference, rest = CASES[case]
    is_segment = case.startswith("segment")
    for size in (0, 1, 3):
        index = as_int64([0, size]) if is_segment else torch.full((size,), -1, dtype=torch.int32)
        values = torch.randn(size)
        assert torch.equal(op(values, index, *rest[1:]), reference(values, index, *rest[1:]))
    strided = torch.randn(20, 2, dtype=torch.float64)[:, 1]
    assert torch.equal(op(strided, *rest), op(strided.contiguous(), *rest))
    if is_segment:
        assert op(torch.ones(0), as_int64([0]), *rest[1:]).shape == (0,)


def test_repeat_gives_equal_bits():
    values = torch.randn(4000)
    offsets = torch.arange(0, 4001, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = ops.segment_cumsum(values, offsets)
        torch.set_num_threads(2)
        assert torch.equal(first, ops.segment_cumsum(values, offsets))
    finally:
        torch.set_num_threads(threads)
    parent = random_tree(200)
    for op in (ops.tree_cumsum, ops.subtree_sum):
        assert torch.equal(op(values[:200], parent), op(values[:200], parent))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_opcheck(case, dtype):
    _, _, rest = CASES[case]
    name = case.removesuffix("_reverse")
    values = torch.ones(20, dtype=dtype, requires_grad=dtype.is_floating_point)
    opcheck(getattr(torch.ops.fastgfn, name).default, (values, *rest))


def test_refuses_bad_input():
    parent = random_tree(3)
    for op in (ops.tree_cumsum, ops.subtree_sum):
        name = op.__name__
        with pytest.raises(ValueError, match=f"{name}: values must be float32, float64 or int64, got Half"):
            op(torch.ones(3).half(), parent)
        with pytest.raises(ValueError, match=rf"{name}: parent must be \[2\], got \[3\]"):
            op(torch.ones(2), parent)
        with pytest.raises(ValueError, match=f"{name}: parent must be Int, got Long"):
            op(torch.ones(3), parent.long())
        for bad in ([0, 0, 0], [-1, 2, 0], [-2, 0, 0]):
            with pytest.raises(ValueError, match=f"{name}: parent must be -1 or an earlier node"):
                op(torch.ones(3), torch.tensor(bad, dtype=torch.int32))
    for bad in ([0, 2], [1, 3], [0, 2, 1, 3], []):
        with pytest.raises(ValueError, match="segment_cumsum: offsets must be non-decreasing from 0 to 3"):
            ops.segment_cumsum(torch.ones(3), as_int64(bad))
