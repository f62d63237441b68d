import sys
import types

import pytest
import torch

from fastgfn import checks
from fastgfn.kernels import tree_attention as kernels
from fastgfn.ops import attention as op
from fastgfn.ops.attention import TreeMask, tree_attention
from fastgfn.testing import forest, random_depths

TREES = {
    "one": [0],
    "chain": list(range(53)),
    "star": [0] + [1] * 40,
    "roots": [0] * 19,
    "chains": [*range(17), *range(16), *range(30)],
    "prompt": list(range(34)) + [*range(34, 41), *range(36, 40), *range(34, 50)],
    "random": random_depths(70),
    "bushy": random_depths(37, deeper=0.5, seed=1),
}
BRANCHES = ("star", "prompt", "random", "bushy")


def make_inputs(tree, heads=4, kv_heads=2, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(h, len(tree), width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator) for s in shapes], TreeMask(*forest(tree))


def _visible(end, position, window):
    i, j = torch.meshgrid(torch.arange(len(end)), torch.arange(len(end)), indexing="ij")
    visible = (j <= i) & (i < end[None])
    return visible if window is None else visible & (position[:, None] - position[None] < window)


def _rank(row, block):
    """0 if a row of a plan lists the block as full, 1 as partial, 2 as unseen."""
    place = row[2:].index(block)
    return int(place >= row[0]) + int(place >= row[1])


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("queries, keys", [(16, 16), (32, 16), (16, 32), (8, 4)])
def test_a_plan_never_skips_a_visible_pair(queries, keys, window):
    trees = [*TREES.values(), *(random_depths(5 + 9 * s, deeper=0.7 + 0.02 * s, seed=s) for s in range(14))]
    found = set()
    for tree in trees:
        end, position = forest(tree)
        mask, visible = TreeMask(end, position), _visible(end, position, window)
        by_query, by_key = (mask.plan(queries, keys, window, by_key=b).tolist() for b in (False, True))
        for a, row in enumerate(by_query):
            for b, column in enumerate(by_key):
                pairs = visible[a * queries : (a + 1) * queries, b * keys : (b + 1) * keys]
                rank = _rank(row, b)
                assert rank == _rank(column, a)
                assert rank != 0 or (bool(pairs.all()) and pairs.shape[1] == keys)
                assert rank != 2 or not bool(pairs.any())
                found.add(rank)
    # the depths under two blocks in a row differ by up to queries + keys - 1, which a full block must allow
    may_be_full = window is None or window >= queries + keys
    assert found == ({0, 1, 2} if may_be_full else found & {0} | {1, 2})


def test_a_plan_skips_the_samples_of_others():
    end, position = forest(list(range(64)) + list(range(64, 96)) * 8)
    plan = TreeMask(end, position).plan(32, 16, None)
    # the prompt's four blocks in full, and two of the sample's own
    assert plan[2:, :2].tolist() == [[4, 6]] * 8
    assert plan[5, 2:6].tolist() == [0, 1, 2, 3] and plan[5, 6:8].tolist() == [10, 11]


# The signature of flash-attn 2.8.
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k)
    left, right = window_size
    assert right == (-1 if left < 0 else 0)
    out = []
    for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1) for x in part)
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (key, value))
        i = torch.arange(query.shape[1])
        visible = (i[None] <= i[:, None]) & ((left < 0) | (i[:, None] - i[None] <= left))
        scores = query @ key.transpose(1, 2) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        out.append((scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("tree", ["one", "chain", "chains", "roots"])
def test_flash_attn_contract(tree, options, package):
    inputs, mask = make_inputs(TREES[tree])
    inputs = [x.double().requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])
    results = []
    for provider in ("flash_attn", "sdpa"):
        out = tree_attention(*inputs, mask, scale=0.3, provider=provider, **options)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tree", BRANCHES)
def test_flash_attn_refuses_branches(tree, package):
    inputs, mask = make_inputs(TREES[tree])
    with pytest.raises(
        checks.InputError, match="mask must be a chain or several .* got a tree with branches"
    ):
        tree_attention(*inputs, mask, scale=0.3, provider="flash_attn")


def test_flash_attn_is_refused_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    inputs, mask = make_inputs(TREES["chain"])
    with pytest.raises(checks.MissingPackageError, match="package flash-attn must be installed"):
        tree_attention(*inputs, mask, scale=0.3, provider="flash_attn")


def test_triton_on_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "IS_INTERPRETED", False)
    inputs, mask = make_inputs(TREES["bushy"])
    with pytest.raises(checks.InputError, match="provider must be 'sdpa' or None here, got 'triton' on cpu"):
        tree_attention(*inputs, mask, scale=0.2, provider="triton")
    dense = tree_attention(*inputs, mask, scale=0.2)
    assert torch.equal(dense, tree_attention(*inputs, mask, scale=0.2, provider="sdpa"))


def test_every_provider_is_reached(monkeypatch):
    functions = {"triton": "triton_attention", "flex": "_flex_attention", "flash_attn": "flash_attention"}
    inputs, mask = make_inputs(TREES["one"])
    for name, function in functions.items():
        monkeypatch.setattr(op, function, lambda *args, name=name: name)
        assert tree_attention(*inputs, mask, scale=1.0, provider=name) == name
    monkeypatch.setattr(op, "check_inputs", lambda *args: None)
    on_cuda = types.SimpleNamespace(is_cuda=True)
    assert tree_attention(on_cuda, None, None, mask, scale=1.0) == "triton"
