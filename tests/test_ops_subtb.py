"""SubTB on padded rows and on token trees: csrc/subtb.cpp against the quadratic references."""

import random
import time
from pathlib import Path

import pytest
import torch

from fastgfn.ops import subtb as ops
from fastgfn.ops.residual import LOSSES
from fastgfn.reference import subtb as reference
from fastgfn.testing import assert_close_to_truth, relative_error

LAMBDAS = [0.0, 0.5, 0.9, 1.0]
PAIRWISE = [loss for loss in LOSSES if "squared" not in loss]


def padded_inputs(lengths, width, dtype=torch.float64, scale=1.0):
    """Random rows with NaN on the padding."""
    lengths = torch.tensor(lengths, dtype=torch.int64)
    column = torch.arange(width + 1)
    log_pf = -scale * torch.rand(len(lengths), width).to(dtype)
    log_flow = -scale * torch.randn(len(lengths), width + 1).to(dtype)
    log_pf[column[:-1] >= lengths[:, None]] = torch.nan
    log_flow[column > lengths[:, None]] = torch.nan
    return log_pf.requires_grad_(), log_flow.requires_grad_(), lengths


def tree_inputs(num_groups=3, rows=9, depth=7, vocab=2, valid_rate=0.7, dtype=torch.float64):
    """A random forest in depth-first order: (log_pf, log_flow, parent, valid, weight); NaN where invalid."""
    parent = []
    for _ in range(num_groups):
        children = {}
        for _ in range(rows):
            node = children
            for _ in range(random.randint(0, depth)):
                node = node.setdefault(random.randrange(vocab), {})
        stack = [(children, -1)]
        while stack:
            node, above = stack.pop()
            parent.append(above)
            stack += [(child, len(parent) - 1) for child in reversed(node.values())]
    size = len(parent)
    valid = torch.rand(size) < valid_rate
    log_flow = torch.where(valid, torch.randn(size), torch.nan).to(dtype)
    log_pf = (-torch.rand(size)).to(dtype)
    weight = torch.randint(0, 4, (size,)).to(dtype)
    parent = torch.tensor(parent, dtype=torch.int32)
    return log_pf.requires_grad_(), log_flow.requires_grad_(), parent, valid, weight


def value_and_grads(value, *tensors):
    return value.detach(), *torch.autograd.grad(value, tensors)


def zeroed(tensor):
    """The references multiply NaN by 0 where the ops do not read."""
    return tensor.detach().nan_to_num(0.0).requires_grad_()


# Values and gradients.


@pytest.mark.parametrize("subtb_lambda", LAMBDAS)
def test_padded_equals_reference(subtb_lambda):
    log_pf, log_flow, lengths = padded_inputs([5, 0, 1, 9, 12], 12)
    upstream = torch.randn(5, dtype=torch.float64)
    num, den = ops.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    truth_num, truth_den = reference.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    got = value_and_grads((num * upstream).sum(), log_pf, log_flow)
    want = value_and_grads((truth_num * upstream).sum(), log_pf, log_flow)
    for name, a, b in zip(("loss", "grad log_pf", "grad log_flow"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)
    torch.testing.assert_close(num, truth_num, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(den, truth_den, rtol=1e-12, atol=0)
    padding = torch.arange(12) >= lengths[:, None]
    assert bool((got[1][padding] == 0).all()) and bool((got[2][:, 1:][padding] == 0).all())


@pytest.mark.parametrize("subtb_lambda", LAMBDAS)
@pytest.mark.parametrize("valid_rate", [0.0, 0.5, 1.0])
def test_tree_equals_reference(subtb_lambda, valid_rate):
    log_pf, log_flow, parent, valid, weight = tree_inputs(valid_rate=valid_rate)
    clean = zeroed(log_flow)
    value = ops.subtb_tree(log_pf, log_flow, parent, valid, weight, subtb_lambda)
    truth = reference.subtb_tree(log_pf, clean, parent, valid, weight, subtb_lambda)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-11)
    if truth.requires_grad:
        want = torch.autograd.grad(truth, (log_pf, clean), materialize_grads=True)
        got = torch.autograd.grad(value, (log_pf, log_flow))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    pairs = ops.subtb_tree_pairs(parent, valid, subtb_lambda)
    torch.testing.assert_close(pairs, reference.subtb_tree_pairs(parent, valid, subtb_lambda))


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.9])
def test_gradcheck(subtb_lambda):
    log_pf, log_flow, lengths = padded_inputs([4, 0, 2], 4)
    clean = (zeroed(log_pf), zeroed(log_flow))
    torch.autograd.gradcheck(lambda a, b: ops.subtb_padded(a, b, lengths, subtb_lambda)[0], clean)
    pf, flow, *rest = tree_inputs(rows=4, depth=4)
    clean = (pf, zeroed(flow))
    torch.autograd.gradcheck(lambda a, b: ops.subtb_tree(a, b, *rest, subtb_lambda), clean)


@pytest.mark.parametrize("subtb_lambda", [0.9, 1.0])
@pytest.mark.parametrize("noise", [100.0, 1.0], ids=["far", "near_solution"])
def test_fp32_at_length_512(subtb_lambda, noise):
    # Flows of some hundred nats, as a long text's log-reward has; near the solution the residuals are 1 nat.
    lengths = torch.tensor([512, 301])
    log_pf = -2 * torch.rand(2, 512)
    log_flow = torch.nn.functional.pad(log_pf.cumsum(1), (1, 0)) + noise * torch.randn(2, 513)
    inputs = [log_pf, log_flow]
    naive, fused, truth = [], [], []
    for kind, dtype, run in (
        (naive, torch.float32, reference.subtb_padded),
        (fused, torch.float32, ops.subtb_padded),
        (truth, torch.float64, reference.subtb_padded),
    ):
        args = [x.to(dtype).requires_grad_() for x in inputs]
        kind += value_and_grads(run(*args, lengths, subtb_lambda)[0].sum(), *args)
    for name, f, n, t in zip(("loss", "grad log_pf", "grad log_flow"), fused, naive, truth, strict=True):
        assert_close_to_truth(name, f, n, t, grad=name != "loss")
        assert relative_error(f, t) <= 1e-6, (name, relative_error(f, t))


@pytest.mark.parametrize("loss", PAIRWISE)
@pytest.mark.parametrize("tile", [1, 40, 2**20])
def test_pairwise_equals_reference(loss, tile, monkeypatch):
    monkeypatch.setattr(ops, "TILE_ELEMENTS", tile)
    log_pf, log_flow, lengths = padded_inputs([5, 0, 1, 8], 8)
    with torch.no_grad():
        log_flow[0, 2] = 95.0
    num, den = ops.subtb_pairwise(log_pf, log_flow, lengths, 0.9, loss)
    truth_num, truth_den = reference.subtb_padded(log_pf, log_flow, lengths, 0.9, loss)
    got = value_and_grads(num.sum(), log_pf, log_flow)
    want = value_and_grads(truth_num.sum(), log_pf, log_flow)
    for a, b in zip((den, num, *got), (truth_den, truth_num, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    padding = torch.arange(8) >= lengths[:, None]
    assert bool((got[1][padding] == 0).all()) and bool((got[2][:, 1:][padding] == 0).all())


def test_trie_equals_padded_rows():
    """A batch with duplicates as a tree (weighted by count) and as rows: same sums, same gradients."""
    rows = [[random.randrange(2) for _ in range(n)] for n in (0, 1, 4, 7, 7, 5, 7, 3)] * 2
    nodes = {(): None}
    for row in rows:
        nodes.update({tuple(row[: k + 1]): None for k in range(len(row))})
    order = sorted(nodes)  # lexicographic order of prefixes is depth-first
    index = {key: i + 2 for i, key in enumerate(order)}  # two prompt nodes stand before s_0
    parent = torch.tensor([-1, 0, *(1 if not key else index[key[:-1]] for key in order)])
    valid = torch.tensor([False, False, *(True for _ in order)])
    weight = torch.tensor([16, 16, *(sum(tuple(row[: len(key)]) == key for row in rows) for key in order)])
    log_pf = torch.randn(len(parent), dtype=torch.float64, requires_grad=True)
    log_flow = torch.randn(len(parent), dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([len(row) for row in rows])
    path = torch.zeros(len(rows), 8, dtype=torch.int64)
    for n, row in enumerate(rows):
        path[n, : len(row) + 1] = torch.tensor([index[tuple(row[:k])] for k in range(len(row) + 1)])
    for subtb_lambda in LAMBDAS:
        value = ops.subtb_tree(log_pf, log_flow, parent, valid, weight.double(), subtb_lambda)
        num, den = ops.subtb_padded(log_pf[path[:, 1:]], log_flow[path], lengths, subtb_lambda)
        for a, b in zip(
            value_and_grads(value, log_pf, log_flow),
            value_and_grads(num.sum(), log_pf, log_flow),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        pairs = ops.subtb_tree_pairs(parent, valid, subtb_lambda)
        torch.testing.assert_close((pairs * weight).sum(), den.sum())


# Odd shapes.


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (3, 1)], ids=str)
def test_padded_odd_shapes(shape):
    n, width = shape
    log_pf, log_flow, lengths = padded_inputs([width] * n, width, torch.float32)
    for strided in (False, True):
        a, b = log_pf.detach(), log_flow.detach()
        if strided:
            a = torch.stack([a, a], 2)[..., 0].T.contiguous().T
            b = torch.stack([b, b], 2)[..., 1]
        a, b = a.requires_grad_(), b.requires_grad_()
        num, den = ops.subtb_padded(a, b, lengths.int(), 0.5)
        got = torch.autograd.grad(num.sum(), (a, b))
        want_num, want_den = reference.subtb_padded(a, b, lengths, 0.5)
        want = torch.autograd.grad(want_num.sum(), (a, b))
        for x, y in zip((num, den, *got), (want_num, want_den, *want), strict=True):
            torch.testing.assert_close(x, y)


def test_tree_odd_shapes():
    for parent in ([], [-1], [-1, -1, -1], [-1, 0, 1, 2, 3]):
        size = len(parent)
        parent = torch.tensor(parent, dtype=torch.int64)
        valid = torch.ones(size, dtype=torch.bool)
        log_pf = torch.randn(size, requires_grad=True)
        value = ops.subtb_tree(log_pf, torch.randn(size), parent, valid, torch.ones(size), 1.0)
        (grad,) = torch.autograd.grad(value, log_pf)
        assert grad.shape == (size,)
        assert bool((grad[parent < 0] == 0).all())
        assert (value.item() > 0) == (size == 5)


def test_deep_tree_has_no_recursion():
    size = 100_000
    parent = torch.arange(-1, size - 1)
    log_pf = torch.zeros(size, requires_grad=True)
    log_flow = torch.zeros(size)
    log_flow[0] = 1.0
    ones = torch.ones(size)
    value = ops.subtb_tree(log_pf, log_flow, parent, ones.bool(), ones, 1.0)
    (grad,) = torch.autograd.grad(value, log_pf)
    assert value.item() == size - 1 and grad[1].item() == 2 * (size - 1) and grad[0].item() == 0


def test_unused_entries_may_be_nan():
    """log_pf above the first valid node and below the last one, and the weight of invalid nodes."""
    nan = torch.nan
    parent = torch.tensor([-1, 0, 1, 2, 3])
    valid = torch.tensor([False, True, False, True, False])
    log_pf = torch.tensor([nan, nan, 1.0, 2.0, nan], requires_grad=True)
    log_flow = torch.tensor([nan, 4.0, nan, 3.0, nan], requires_grad=True)
    weight = torch.tensor([nan, 1.0, nan, 2.0, nan])
    value = ops.subtb_tree(log_pf, log_flow, parent, valid, weight, 0.5)
    grads = torch.autograd.grad(value, (log_pf, log_flow))
    assert value.item() == 32.0
    assert grads[0].tolist() == [0, 0, 16, 16, 0] and grads[1].tolist() == [0, 16, 0, -16, 0]


# Repeatability.


def test_repeats_bits():
    log_pf, log_flow, lengths = padded_inputs([300, 7, 512] * 100, 512, torch.float32)
    tree = tree_inputs(num_groups=200, dtype=torch.float32)
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2, before):
        torch.set_num_threads(threads)
        num = ops.subtb_padded(log_pf, log_flow, lengths, 0.9)[0]
        value = ops.subtb_tree(*tree, 0.9)
        runs.append([*value_and_grads(num.sum(), log_pf, log_flow), *value_and_grads(value, *tree[:2])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# Registration.


def test_opcheck():
    log_pf, log_flow, lengths = padded_inputs([3, 0, 4], 4)
    torch.library.opcheck(torch.ops.fastgfn.subtb_padded, (zeroed(log_pf), zeroed(log_flow), lengths, 0.9))
    torch.library.opcheck(
        torch.ops.fastgfn.subtb_padded_backward,
        (torch.ones(3).double(), log_pf.detach(), log_flow.detach(), lengths, 0.9),
    )
    pf, flow, parent, valid, weight = tree_inputs(rows=3, depth=3)
    torch.library.opcheck(torch.ops.fastgfn.subtb_tree, (pf, zeroed(flow), parent, valid, weight, 0.9))
    torch.library.opcheck(
        torch.ops.fastgfn.subtb_tree_backward,
        (torch.ones(()).double(), pf.detach(), flow.detach(), parent, valid, weight, 0.9),
    )
    torch.library.opcheck(torch.ops.fastgfn.subtb_tree_pairs, (parent, valid, 0.9))
    torch.library.opcheck(
        torch.ops.fastgfn.subtb_pairwise, (zeroed(log_pf), zeroed(log_flow), lengths, 0.9, "clamped", 0.7)
    )


# Refusals.


def test_padded_refuses():
    log_pf, log_flow, lengths = torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([3, 1])
    good = dict(log_pf=log_pf, log_flow=log_flow, lengths=lengths, subtb_lambda=1.0)
    for change, message in (
        (
            dict(lengths=torch.tensor([3, 4])),
            r"subtb_padded: lengths\[1\] must be in \[0, T\] = \[0, 3\], got 4",
        ),
        (dict(lengths=torch.tensor([-1, 3])), r"lengths\[0\] must be in"),
        (dict(lengths=torch.tensor([1.0, 2.0])), "lengths must be int32 or int64"),
        (dict(lengths=torch.tensor([1])), r"lengths must be \[2\], got \[1\]"),
        (dict(log_flow=log_pf), r"log_flow must be \[2, 4\], got \[2, 3\]"),
        (dict(log_flow=log_flow.double()), "log_flow must be Float, got Double"),
        (dict(log_pf=log_pf.half(), log_flow=log_flow.half()), "log_pf must be float32 or float64"),
        (dict(log_pf=log_pf[0]), "log_pf must be 2-dimensional"),
        (dict(subtb_lambda=1.5), r"subtb_lambda must be in \[0, 1\], got 1.5"),
        (dict(subtb_lambda=-0.1), "subtb_lambda must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.subtb_padded(**(good | change))


def test_tree_refuses():
    zeros = torch.zeros(3)
    good = dict(
        log_pf=zeros, log_flow=zeros, parent=torch.tensor([-1, 0, 1]), valid=zeros == 0, weight=zeros
    ) | dict(subtb_lambda=1.0)
    for change, message in (
        (dict(parent=torch.tensor([-1, 2, 1])), r"subtb_tree: parent\[1\] must be -1 or an earlier node"),
        (
            dict(parent=torch.tensor([-1, -1, 0])),
            r"parent\[2\] must be -1 or an earlier node of the same tree",
        ),
        (dict(parent=torch.tensor([1, 0, 1])), r"parent\[0\] must be"),
        (dict(parent=zeros), "parent must be int32 or int64"),
        (dict(valid=zeros), "valid must be Bool"),
        (dict(weight=torch.tensor([1.0, -1.0, 1.0])), r"weight\[1\] must be >= 0, got -1"),
        (dict(weight=zeros[:2]), r"weight must be \[3\], got \[2\]"),
        (dict(log_pf=zeros[:2]), r"log_pf must be \[3\], got \[2\]"),
        (dict(log_flow=zeros.double()), "log_flow must be Float, got Double"),
        (dict(subtb_lambda=2.0), "subtb_lambda must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.subtb_tree(**(good | change))


# Growth.


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    ("loss", "length"), [("squared", 20_000), ("huber", 2_000)], ids=["squared", "huber"]
)
def test_no_quadratic_buffer(loss, length):
    """One buffer of all pairs would take 3.2 GB or, for huber in fp64, 64 MB (and about 8 are needed)."""

    def step(log_pf, log_flow, lengths):
        if loss == "squared":
            return ops.subtb_padded(log_pf, log_flow, lengths, 1.0)[0].sum().backward()
        return ops.subtb_pairwise(log_pf, log_flow, lengths, 1.0, loss)[0].sum().backward()

    step(*padded_inputs([3], 3))
    inputs = padded_inputs([length, length], length, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_bytes(), time.perf_counter()
    step(*inputs)
    assert peak_bytes() - before < 48 * 2**20
    assert loss != "squared" or time.perf_counter() - start < 5.0
