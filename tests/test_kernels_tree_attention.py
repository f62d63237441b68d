import shutil
import types

import pytest
import torch

from fastgfn import checks
from fastgfn.kernels import tree_attention as kernels
from fastgfn.ops.attention import TreeMask, tree_attention
from fastgfn.reference import attention as plain
from fastgfn.testing import assert_close_to_truth, forest, random_depths

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


pytestmark = pytest.mark.usefixtures("small_blocks")


# one prompt that is seen in full by later blocks, samples that share prefixes, and its duplicate
PROMPT = list(range(34)) + [*range(34, 41), *range(36, 40), *range(34, 50)]
TREES = {
    "one": [0],
    "two_roots": [0, 0],
    "chain": list(range(53)),
    "star": [0] + [1] * 40,
    "roots": [0] * 19,
    "chains": [*range(17), *range(16), *range(30)],
    "prompt": PROMPT,
    "duplicates": [*range(20), *range(20, 24)] * 2,
    "random": random_depths(70),
    "bushy": random_depths(37, deeper=0.5, seed=1),
    "deep": random_depths(64, deeper=0.97, seed=2),
}


def make_inputs(tree, heads=2, kv_heads=1, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    end, position = forest(tree)
    shapes = ((heads, len(tree), width), *[(kv_heads, len(tree), width)] * 2, (heads, len(tree), width))
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return tensors, end, position


def run(function, tensors, dtype, device="cpu"):
    """The output and the gradients of query, key and value under a random upstream gradient."""
    *inputs, upstream = [t.to(device, dtype) for t in tensors]
    inputs = [t.requires_grad_() for t in inputs]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, upstream.to(out))
    named = dict(zip(("out", "d_query", "d_key", "d_value"), (out.detach(), *grads), strict=True))
    assert all(t.dtype == dtype for t in named.values())
    return {name: t.cpu() for name, t in named.items()}


def fused(end, position, **options):
    mask = TreeMask(end.to(DEVICE), position.to(DEVICE))
    return lambda q, k, v: tree_attention(q, k, v, mask, provider="triton", **options)


def compare(tensors, end, position, dtype, **options):
    options = {"scale": tensors[0].shape[2] ** -0.5} | options

    def reference(q, k, v):
        return plain.tree_attention(q, k, v, end, position, **options)

    got = run(fused(end, position, **options), tensors, dtype, DEVICE)
    naive = run(reference, tensors, dtype)
    truth = run(reference, [t.to(dtype).double() for t in tensors], torch.float64)
    for name in truth:
        assert_close_to_truth(name, got[name], naive[name], truth[name], grad=name != "out")


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "window_1": {"window": 1},
    "window_9": {"window": 9},
    "both": {"window": 20, "softcap": 2.0, "scale": 0.4},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", ["prompt", "random"])
def test_values_and_gradients(tree, options, dtype):
    compare(*make_inputs(TREES[tree]), DTYPES[dtype], **OPTIONS[options])


@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
    compare(*make_inputs(TREES[tree], 1, 1), torch.float32)
    compare(*make_inputs(TREES[tree], 1, 1), torch.float32, window=5, softcap=3.0)


@pytest.mark.parametrize("size", [2, 15, 16, 17, 31, 33, 48, 65])
def test_odd_sizes(size):
    compare(*make_inputs(random_depths(size, seed=size), 1, 1), torch.float32)


# group sizes 1, 3 and 4, and head dims that are padded to the next power of two
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(1, 1, 8), (3, 1, 24), (8, 2, 16), (1, 1, 64), (2, 1, 80), (1, 1, 96)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_widths(heads, kv_heads, width, dtype):
    compare(*make_inputs(random_depths(35), heads, kv_heads, width), DTYPES[dtype])


def test_the_shipped_blocks(monkeypatch):
    monkeypatch.undo()
    assert max(max(b.queries, b.keys) for t in kernels.HOPPER.values() for b in t) == 128
    for width in (64, 128, 256):
        compare(*make_inputs(random_depths(150), 1, 1, width), torch.float32)
        compare(*make_inputs(random_depths(150), 1, 1, width), torch.bfloat16)
        compare(*make_inputs(random_depths(150), 1, 1, width), torch.bfloat16, window=30)


@pytest.mark.parametrize(
    ("major", "kilobytes", "want"),
    [
        (8, 163, "AMPERE"),
        (8, 99, "WORKSTATION"),
        (9, 227, "HOPPER"),
        (10, 227, "BLACKWELL"),
        (12, 99, "WORKSTATION"),
    ],
)
def test_the_table_of_a_card(major, kilobytes, want, monkeypatch):
    monkeypatch.undo()
    card = types.SimpleNamespace(major=major, shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    query = types.SimpleNamespace(shape=(4, 9, 200), dtype=torch.bfloat16, device="cuda:1", is_cuda=True)
    assert kernels.table(query, None, None) == getattr(kernels, want)[256]
    if want in ("HOPPER", "BLACKWELL"):
        assert kernels.table(query, None, 5) == getattr(kernels, want + "_OPTIONS")[256]


def test_a_strided_mask():
    tensors, end, position = make_inputs(TREES["random"])
    table = torch.stack([end, position.int()], dim=1)
    assert not table[:, 0].is_contiguous()
    for options in ({}, {"window": 5}):
        got, want = (
            run(fused(*mask, scale=0.2, **options), tensors, torch.float32, DEVICE)
            for mask in ((table[:, 0], table[:, 1]), (end, position))
        )
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("layout", ["nodes_first", "slice", "fused_projection"])
def test_strides(layout):
    tensors, end, position = make_inputs(TREES["random"], 2, 2)
    q, k, v, upstream = (t.float().to(DEVICE) for t in tensors)
    if layout == "nodes_first":
        views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    elif layout == "slice":
        views = [torch.cat([t, t.new_full(t.shape, torch.nan)], dim=2)[..., :16] for t in (q, k, v)]
    else:
        views = torch.cat([q, k, v], dim=2).split(16, dim=2)
    function = fused(end, position, scale=0.2)
    got = run(function, [*views, upstream], torch.float32, DEVICE)
    want = run(function, tensors, torch.float32, DEVICE)
    assert not views[0].is_contiguous()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_expanded_upstream_gradient():
    tensors, end, position = make_inputs(TREES["bushy"])
    q, k, v, upstream = (t.float().to(DEVICE) for t in tensors)
    q.requires_grad_()
    (got,) = torch.autograd.grad(fused(end, position, scale=0.2)(q, k, v).sum(), q)
    (want,) = torch.autograd.grad(fused(end, position, scale=0.2)(q, k, v), q, torch.ones_like(upstream))
    assert torch.equal(got, want)


def test_lse_and_its_gradient():
    tensors, end, position = make_inputs(TREES["random"])
    q, k, v, upstream = (t.float().to(DEVICE) for t in tensors)
    q.requires_grad_()
    mask = TreeMask(end.to(DEVICE), position.to(DEVICE))
    plans = mask.plan(32, 16, None), mask.plan(16, 16, None), mask.plan(16, 32, None, by_key=True)
    args = (*mask.nodes(), *plans, 0.3, None, None)
    out, lse = torch.ops.fastgfn.tree_attention(q, k, v, *args)
    (block,) = mask.row_blocks(None)
    score = 0.3 * q.double() @ k.double().transpose(1, 2) + mask.additive(block, None, torch.float64)
    truth = score.logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad((out * upstream).sum() + 2.0 * lse.sum(), q)
    truth_out = score.softmax(-1) @ v.double()
    (want,) = torch.autograd.grad((truth_out * upstream).sum() + 2.0 * truth.sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_repeatability(dtype):
    tensors, end, position = make_inputs(TREES["random"], 4, 2)
    options = dict(scale=0.3, window=11, softcap=2.0)
    first, second = (run(fused(end, position, **options), tensors, DTYPES[dtype], DEVICE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_gradient_needs_no_plan_of_the_backward():
    tensors, end, position = make_inputs(TREES["random"])
    inputs = [t.float().to(DEVICE) for t in tensors[:3]]
    mask = TreeMask(end.to(DEVICE), position.to(DEVICE))
    out = tree_attention(*inputs, mask, scale=0.2, provider="triton")
    assert out.transpose(0, 1).is_contiguous()
    assert sum(key[0] == "plan" for key in mask._cache if isinstance(key, tuple)) == 1
    empty = TreeMask(mask.end[:0], mask.position[:0])
    assert tree_attention(*(t[:, :0] for t in inputs), empty, scale=0.2, provider="triton").shape == (
        2,
        0,
        16,
    )


def _seen_by(end, node):
    i = torch.arange(len(end))
    return (i >= node) & (i < end[node])


# A node in the middle of a full block, of a partial block, and the last leaf; each alone or all three.
@pytest.mark.parametrize("which", ["query", "key", "value", "upstream", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("node", [3, 38, 60])
def test_a_value_that_is_not_finite_reaches_only_what_sees_it(node, value, which):
    tensors, end, position = make_inputs(TREES["prompt"])
    function = fused(end, position, scale=0.25)
    clean = run(function, tensors, torch.float32, DEVICE)
    names = ("query", "key", "value", "upstream")
    for t in (t for name, t in zip(names, tensors, strict=True) if which in (name, "all")):
        t[:, node] = value
    got = run(function, tensors, torch.float32, DEVICE)
    rows = torch.zeros(len(end), dtype=torch.bool)
    rows[node] = True
    if which in ("key", "value", "all"):
        rows |= _seen_by(end, node)
    columns = torch.stack([_seen_by(end, j)[rows].any() for j in range(len(end))])
    touched = {"out": rows, "d_query": rows, "d_key": columns, "d_value": columns}
    for name, where in touched.items():
        assert torch.equal(got[name][:, ~where], clean[name][:, ~where]), name
    if value != value and which != "upstream":
        assert bool(got["out"][:, rows].isnan().all())
    if value != value:
        assert bool(got["d_value"][:, node].isnan().all() and got["d_query"][:, node].isnan().all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["1e4", "-1e4"])
def test_extreme_scores(sign, softcap, dtype):
    """Scores of about 1e4, exact in every dtype, that differ by 64 at least: softmax is one-hot."""
    (q, k, v, upstream), end, position = make_inputs(TREES["prompt"])
    q.zero_(), k.zero_()
    q[..., 0], k[..., 0] = 128.0 * sign, 80.0
    q[..., 1], k[..., 1] = 64.0, torch.randperm(k.shape[1]).double()
    tensors, dtype, options = (q, k, v, upstream), DTYPES[dtype], dict(scale=1.0, softcap=softcap)

    def reference(q, k, v):
        return plain.tree_attention(q, k, v, end, position, **options)

    got = run(fused(end, position, **options), tensors, dtype, DEVICE)
    naive = run(reference, tensors, dtype)
    truth = run(reference, [t.to(dtype).double() for t in tensors], torch.float64)
    assert_close_to_truth("out", got["out"], naive["out"], truth["out"])
    # p is recomputed from lse, whose rounding at 1e4 is 2^-11; p * (dp - delta) leaves the rounding of dp
    for name, size in (("d_query", k), ("d_key", q), ("d_value", 1e4 * torch.ones(1))):
        rounding = 2.0**-22 if dtype == torch.float32 or name != "d_value" else 2.0**-8
        bound = rounding * float(size.abs().max()) * float(upstream.abs().sum() * v.abs().max())
        torch.testing.assert_close(got[name].double(), truth[name], rtol=0, atol=bound)


def test_opcheck():
    tensors, end, position = make_inputs(TREES["bushy"])
    inputs = [t.float().to(DEVICE).requires_grad_() for t in tensors[:3]]
    mask = TreeMask(end.to(DEVICE), position.to(DEVICE))
    for window in (None, 4):
        plans = mask.plan(32, 16, window), mask.plan(16, 16, window), mask.plan(16, 32, window, by_key=True)
        args = (*inputs, *mask.nodes(), *plans, 0.3, 2.0, window)
        torch.library.opcheck(torch.ops.fastgfn.tree_attention.default, args)
        fixed = [t.detach() for t in inputs]
        out, lse = torch.ops.fastgfn.tree_attention(*fixed, *args[3:])
        saved = (*fixed, out, lse, *mask.nodes(), *plans[1:], 0.3, 2.0, window)
        grads = (torch.randn_like(out), torch.zeros_like(lse))
        torch.library.opcheck(torch.ops.fastgfn.tree_attention_backward.default, (*grads, *saved))


def _arguments(**change):
    tensors, end, position = make_inputs(TREES["bushy"], 4, 2)
    q, k, v = (t.float().to(DEVICE) for t in tensors[:3])
    mask = TreeMask(end.to(DEVICE), position.to(DEVICE))
    return dict(query=q, key=k, value=v, mask=mask, scale=0.2, provider="triton") | change


ZEROS = torch.zeros(4, 37, 257)
DOUBLE = {name: ZEROS[:2, :, :16].double() for name in ("query", "key", "value")}
REFUSALS = {
    "provider": (dict(provider="cudnn"), "provider must be None or one of 'triton', 'sdpa', 'flex'"),
    "dtype": (DOUBLE, "query must be float32, bfloat16 or float16"),
    "mixed": (dict(key=ZEROS[:2, :, :16].half()), "key must be torch.float32 as query is, got torch.float16"),
    "stride": (dict(value=ZEROS[:2, :, :32:2]), "value must be (heads, nodes, head dim) with a contiguous"),
    "dims": (dict(query=ZEROS[None, ..., :16]), "query must be (heads, nodes, head dim)"),
    "width": (
        dict(query=ZEROS, key=ZEROS[:2], value=ZEROS[:2]),
        "query must be of head dim <= 256, got 257; pass provider='sdpa'",
    ),
    "keys": (dict(key=ZEROS[:2, :36, :16]), "key must be (heads, 37, 16), got (2, 36, 16)"),
    "values": (dict(value=ZEROS[..., :16]), "value must be (2, 37, 16), got (4, 37, 16)"),
    "heads": (dict(query=ZEROS[:3, :, :16]), "query must be of a multiple of 2 heads, got 3"),
    "mask": (dict(mask=TreeMask(*(t.to(DEVICE) for t in forest([0] * 36)))), "mask must be (37,), got (36,)"),
    "scale": (dict(scale=-0.1), "scale must be > 0, got -0.1; pass provider='sdpa'"),
    "window": (dict(window=0), "window must be > 0, got 0"),
    "softcap": (dict(softcap=0.0), "softcap must be > 0, got 0.0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_bad_input(case):
    change, message = REFUSALS[case]
    kind = checks.InputTypeError if case in ("dtype", "mixed") else checks.InputError
    change = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in change.items()}
    with pytest.raises(kind) as error:
        tree_attention(**_arguments(**change))
    assert message in str(error.value) and str(error.value).startswith("tree_attention: ")
