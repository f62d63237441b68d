"""Decoder layers in few kernels under merged weights: the same values, and their own forward for the rest."""

import copy
import types
from collections import Counter

import pytest
import torch
from family_models import FAMILIES, make_model, path_to, random_tree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from fastgfn.attention import KeyValues, PathAttention, TreeAttention
from fastgfn.models import Policy
from fastgfn.models.decode_layer import DecoderLayer, take_over_layers
from fastgfn.models.load import add_adapter
from fastgfn.models.probe import HostReads
from fastgfn.ops.attention import TreeMask
from fastgfn.rollout import sample
from fastgfn.types import Constraints, Role

FUSED = ("llama", "llama-tied", "mistral-window", "qwen2", "qwen3")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
# Their norms and angles are those of float32 whatever the dtype.
BOUND = 1e-5


def make(family="llama", dtype=torch.float64, fused=True):
    model = add_adapter(make_model(family, "fastgfn", dtype).requires_grad_(False), 2, 2).to(dtype)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=noise, dtype=torch.float64) * 0.1)
    policy = Policy(model)
    return policy if fused else unfused(policy)


def unfused(policy):
    """Its layers have their own forward, and its copies are one per layer."""
    for layer in taken(policy):
        del layer.layer.forward
    policy._packed = []
    return policy


def taken(policy):
    forwards = [m.__dict__.get("forward") for m in policy.model.modules()]
    return [f for f in forwards if isinstance(f, DecoderLayer)]


def decode(policy):
    """(T, D) hidden states of the nodes of a tree: the prompts' in one pass, then those of each depth."""
    tree = random_tree()[-1]
    is_prompt, kv = tree.role == Role.PROMPT, KeyValues(tree.num_nodes)
    nodes, ends = is_prompt.nonzero()[:, 0], is_prompt.cumsum(0)
    mask = ends[tree.end[nodes].long() - 1].int(), tree.position[nodes]
    attention = TreeAttention(TreeMask(*on(policy, *mask)), kv, *on(policy, nodes))
    parts = [(nodes, policy.hidden(*on(policy, tree.tokens[nodes], tree.position[nodes]), attention))]
    for k in range(1, int(tree.length.max()) + 1):
        nodes = ((tree.length == k) & ~is_prompt).nonzero()[:, 0]
        length = tree.position[nodes] + 1
        path = torch.zeros(len(nodes), int(length.max()) + 2, dtype=torch.int32)
        for row, node in zip(path, nodes.tolist(), strict=True):
            own = path_to(tree, node)
            row[: len(own)] = torch.tensor(own)
        attention = PathAttention(kv, *on(policy, nodes, path, length))
        parts.append((nodes, policy.hidden(*on(policy, tree.tokens[nodes], tree.position[nodes]), attention)))
    nodes, hidden = (torch.cat(x) for x in zip(*parts, strict=True))
    return hidden.cpu()[nodes.argsort()]


def on(policy, *tensors):
    return [x.to(policy.device) for x in tensors]


def tree_hidden(policy):
    tree = random_tree()[-1]
    return policy.tree_hidden(tree.tokens, tree.position, tree.end)


class Ops(TorchDispatchMode):
    """Counts the ops of its block that compute."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.count[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def counted(run, *args):
    with Ops() as ops:
        run(*args)
    return ops.count


def one_step(policy):
    """The ops of a step of three rows in an empty pool."""
    nodes, kv = torch.arange(3), KeyValues(3)
    attention = PathAttention(kv, nodes, nodes[:, None].int(), torch.ones(3, dtype=torch.int64))
    policy.hidden(nodes, torch.zeros_like(nodes), attention)
    return counted(policy.hidden, nodes, torch.zeros_like(nodes), attention)


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("family", FUSED)
def test_decoding_equals_that_of_the_layers_and_the_tree_forward(family, dtype):
    policy, plain = make(family, dtype), make(family, dtype, fused=False)
    want = tree_hidden(plain)
    with policy.merged(), plain.merged():
        for got in (decode(policy), tree_hidden(policy), decode(plain), tree_hidden(plain)):
            torch.testing.assert_close(got, want, rtol=0, atol=BOUND)
    with policy._adapter_off(), plain._adapter_off():
        base = tree_hidden(plain)
        assert not torch.allclose(base, want, atol=1e-2)
        with policy.merged():
            torch.testing.assert_close(decode(policy), base, rtol=0, atol=BOUND)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_a_gpu_computes_the_same(family):
    policy = make(family, torch.float32)
    want = tree_hidden(policy)
    policy.model.cuda()
    with policy.merged():
        torch.testing.assert_close(decode(policy), want, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_are_taken(family):
    policy = make(family)
    assert len(taken(policy)) == (2 if family in FUSED else 0)
    outside = one_step(policy) if family != "gptj" else {}
    assert not outside.get("fastgfn::rope_write")
    with policy.merged():
        inside = one_step(policy) if family != "gptj" else {}
        tree = counted(tree_hidden, policy)
    ours = 2 * (family in FUSED)
    for name in ("rms_norm", "add_rms_norm", "rope_write", "silu_mul_row"):
        assert inside.get(f"fastgfn::{name}", 0) == ours
        assert tree[f"fastgfn::{name}"] == (0 if name == "rope_write" else ours)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_a_step_has_nine_kernels_a_layer(family, monkeypatch):
    """In float64, whose products torch computes as it does on a GPU."""
    config, counts = FAMILIES[family], []
    for num_layers in (2, 3):
        deeper = copy.deepcopy(config)
        deeper.num_hidden_layers = num_layers
        if getattr(deeper, "layer_types", None):
            deeper.layer_types = [deeper.layer_types[0]] * num_layers
        monkeypatch.setitem(FAMILIES, family, deeper)
        policy, plain = make(family), make(family, fused=False)
        with policy.merged(), plain.merged():
            counts.append((one_step(policy), one_step(plain)))
    (few, many), (few_more, many_more) = counts
    layer = few_more - few
    assert layer.total() == 9, layer
    products = {"aten::mm": 3, "aten::addmm_": 1, "fastgfn::path_attention": 1}
    assert {name: n for name, n in layer.items() if name in products} == products
    assert (many_more - many).total() >= 30


@torch.no_grad()
def test_a_step_reads_nothing_on_the_host():
    policy = make(dtype=torch.float32)
    with policy.merged(), HostReads() as reads:
        one_step(policy)
    assert not reads.found


@DTYPES
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_copies_are_not_doubled(dtype, precision):
    policy, plain = (make("qwen2", dtype, fused=fused) for fused in (True, False))

    def num_bytes(policy):
        weights = {id(m.merged.weight): m.merged.weight for m in policy._linear}
        return len(weights), sum(x.numel() * x.element_size() for x in weights.values())

    with policy.merged(precision) as count, plain.merged(precision):
        assert count == len(policy._linear) == 14
        (few, size), (many, want) = num_bytes(policy), num_bytes(plain)
        assert size == want and (few, many) == (8, 14)
        asked = []
        policy.may_keep = lambda n: asked.append(n) or False
    assert asked == [size]
    assert all(m.merged is None and m.spare is None for m in policy._linear)


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_of_shared_copies_compute_their_own_rows(family, precision):
    policy, plain = make(family), make(family, fused=False)
    with policy.merged(precision), plain.merged(precision):
        for ours, theirs in zip(policy._linear, plain._linear, strict=True):
            x = torch.randn(2, 3, ours.weight.shape[1], dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2 if precision else 1e-12, atol=1e-12)
        got, want = (decode(p) for p in (policy, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=0.3 if precision else BOUND)


@pytest.mark.parametrize("family", FUSED)
def test_draws_are_the_same(family):
    options = dict(constraints=Constraints(0, max_length=6), num_samples=8, seed=3)
    policies = [make(family, torch.float32, fused) for fused in (True, False)]
    got, want = (sample([[1, 2, 3], [7, 3], [1]], policy=p, **options) for p in policies)
    assert got.sequences() == want.sequences() and len({tuple(s) for s in want.sequences()}) > 8
    torch.testing.assert_close(got.log_pf, want.log_pf, rtol=0, atol=1e-4, equal_nan=True)


@torch.no_grad()
def test_copies_of_changed_weights_are_where_the_last_were(monkeypatch):
    policy = make("qwen2")
    monkeypatch.setattr(Policy, "may_keep", lambda self, num_bytes: True)
    seen = []
    for change in (1.0, 0.5, 0.5):
        for _, p in policy.parameters():
            p.mul_(change)
        with policy.merged():
            weights = [m.merged.weight for m in policy._linear]
            biases = [m.merged.bias.data_ptr() for m in policy._linear if m.merged.bias is not None]
            addresses = [w.data_ptr() for w in weights], biases, policy.addresses()
            seen.append((addresses, [w.clone() for w in weights]))
            want = tree_hidden(unfused(copy.deepcopy(policy)))
            torch.testing.assert_close(decode(policy), want, rtol=0, atol=BOUND)
    assert seen[0][0] == seen[1][0] == seen[2][0] and len(biases) == 6
    assert not any(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["", "self_attn", "mlp", "input_layernorm", "self_attn.q_norm", "self_attn.k_proj"],
)
def test_hooks_are_called(name):
    policy, calls = make("qwen3"), []
    module = taken(policy)[1].layer.get_submodule(name)
    with policy.merged():
        want = one_step(policy)
        hook = module.register_forward_hook(lambda *_: calls.append(1))
        step = one_step(policy)
        torch.testing.assert_close(decode(policy), tree_hidden(policy), rtol=0, atol=BOUND)
        hook.remove()
        again = one_step(policy)
    assert len(calls) > 2 and again == want
    assert step["fastgfn::rope_write"] == (1 if name else 2)


@torch.no_grad()
def test_another_forward_inside_a_layer_is_called():
    policy, calls = make(), []
    norm = taken(policy)[0].layer.post_attention_layernorm
    norm.forward = lambda x: calls.append(1) or type(norm).forward(norm, x)
    with policy.merged():
        torch.testing.assert_close(decode(policy), tree_hidden(policy), rtol=0, atol=BOUND)
    assert calls


@torch.no_grad()
def test_what_is_not_covered_goes_to_the_layer():
    policy = make()
    want = one_step(policy)
    assert not want["fastgfn::add_rms_norm"]
    with policy.merged():
        assert one_step(policy)["fastgfn::add_rms_norm"] == 2
        with torch.autocast("cpu", torch.bfloat16):
            assert not one_step(policy)["fastgfn::add_rms_norm"]
        with policy._adapter_off():
            assert not one_step(policy)["fastgfn::add_rms_norm"]
        with torch.enable_grad():
            hidden = tree_hidden(policy)
        torch.testing.assert_close(hidden, decode(policy), rtol=0, atol=BOUND)
        assert hidden.requires_grad
    assert one_step(policy) == want


@torch.no_grad()
def test_one_layer_that_cannot_be_merged_leaves_the_others_packed():
    policy, plain = make(), make(fused=False)
    for p in (policy, plain):
        p._backbone.layers[0].self_attn.k_proj.base_layer.weight.requires_grad_(True)
    with policy.merged() as count, plain.merged() as want:
        assert count == want == 13
        assert one_step(policy)["fastgfn::add_rms_norm"] == 1
        torch.testing.assert_close(decode(policy), decode(plain), rtol=0, atol=BOUND)
    first = policy._packed[0].members
    assert policy._packed[0].merge() is False and all(m.merged is None for m in first)


@torch.no_grad()
def test_weights_that_need_no_copy_are_not_packed():
    """Without an adapter, or with it off, plain products read the weights themselves."""
    policy = Policy(make_model("qwen2", "fastgfn").requires_grad_(False))
    with policy.merged():
        assert all(m.merged.weight is m.base.weight for m in policy._linear)
        step = one_step(policy)
        torch.testing.assert_close(decode(policy), tree_hidden(policy), rtol=0, atol=BOUND)
    assert step["fastgfn::rope_write"] == 2 and step["aten::cat"] >= 4
    # merged again in the memory of an earlier copy
    policy = make()
    policy.may_keep = lambda num_bytes: True
    with policy.merged():
        copies = policy.addresses()[0][1]
    with policy._adapter_off(), policy.merged():
        assert [a[0] for a in policy.addresses()[0][1]] == [a[0] for a in copies]
        torch.testing.assert_close(decode(policy), tree_hidden(policy), rtol=0, atol=BOUND)


@torch.no_grad()
def test_a_layer_leaves_its_input_as_it_is():
    policy, seen = make(), []
    layer = taken(policy)[0].layer
    layer.register_forward_pre_hook(lambda _, args: seen.extend([args[0], args[0].clone()]))
    with policy.merged():
        one_step(policy)
    assert torch.equal(*seen[:2])


def test_a_plain_model_has_the_forwards_of_transformers():
    policy = make()
    forwards = taken(policy)
    with policy.plain() as model:
        assert not taken(policy)
        assert all("forward" not in m.layer.__dict__ for m in forwards)
        ids = torch.arange(1, 6)
        with torch.no_grad():
            want = policy._backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        assert model.config._attn_implementation == "sdpa"
    assert taken(policy) == forwards
    end = torch.full((5,), 5, dtype=torch.int32)
    with torch.no_grad(), policy.merged():
        got = policy.tree_hidden(ids, torch.arange(5), end)
    torch.testing.assert_close(got, want, rtol=0, atol=BOUND)


def test_checkpointed_layers_decode_in_few_kernels():
    policy = make()
    want, forwards = tree_hidden(policy), taken(policy)
    policy.gradient_checkpointing = True
    got = tree_hidden(policy)
    assert torch.equal(got, want)
    pairs = [torch.autograd.grad(x.sum(), [p for _, p in policy.parameters()]) for x in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    with torch.no_grad(), policy.merged():
        assert one_step(policy)["fastgfn::rope_write"] == 2
    policy.gradient_checkpointing = False
    assert taken(policy) == forwards


class Scaled(LlamaDecoderLayer):
    def forward(self, hidden_states, **options):
        return 1.1 * super().forward(hidden_states, **options)


def other_rotation():
    """An attention with the text of Llama's whose module rotates otherwise, as GLM and Cohere do."""
    forward = LlamaAttention.forward
    scope = forward.__globals__ | {"apply_rotary_pos_emb": lambda q, k, cos, sin: (q * cos, k * cos)}
    return type("Other", (LlamaAttention,), {"forward": types.FunctionType(forward.__code__, scope)})


@pytest.mark.parametrize("kind", ["layer", "attention", "norm", "instance", "activation"])
def test_layers_that_compute_something_else_keep_their_forward(kind):
    layers = (policy := unfused(make()))._backbone.layers
    if kind == "layer":
        layers[0].__class__ = Scaled
    elif kind == "attention":
        layers[0].self_attn.__class__ = other_rotation()
    elif kind == "norm":
        layers[0].input_layernorm.__class__ = GemmaRMSNorm
    elif kind == "instance":
        layers[0].forward = layers[0].forward
    else:
        del layers[0].mlp.forward
        layers[0].mlp.act_fn = nn.GELU()
    assert [m.layer for m in take_over_layers(policy._backbone)] == [layers[1]]


def test_widths_above_those_of_the_kernel_keep_their_forward(monkeypatch):
    policy = unfused(make())
    monkeypatch.setattr("fastgfn.models.decode_layer.MAX_WIDTH", 32)
    assert len(take_over_layers(policy._backbone)) == 2
    monkeypatch.setattr("fastgfn.models.decode_layer.MAX_WIDTH", 31)
    unfused(policy)
    assert not take_over_layers(policy._backbone)
