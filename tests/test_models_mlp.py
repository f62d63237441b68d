"""Gated MLPs keep the two projections for backward and make their product again."""

import gc
import pickle
import weakref

import pytest
import torch
from family_models import make_policy
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from fastgfn.models.linear import take_over
from fastgfn.models.mlp import take_over_mlps
from fastgfn.ops.silu_mul import silu_mul

IDS = torch.arange(1, 9)[None]
WIDTH = 48


def make(config=LlamaConfig, dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    model = AutoModelForCausalLM.from_config(config(vocab_size=13, **sizes)).to(dtype)
    options = dict(target_modules="all-linear") | options
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def run(model):
    """Logits, the gradients of the trainable parameters, and how many saved tensors hold the inner width."""
    sizes, seen = [], set()

    def pack(t):
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(input_ids=IDS).logits.double()
        loss = out.square().sum()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(loss, trainable)], sizes.count(IDS.numel() * WIDTH)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj"], ["down_proj"]])
def test_values_and_gradients_stay_the_same(dtype, target):
    want, _ = run(make(dtype=dtype, target_modules=target))
    model = make(dtype=dtype, target_modules=target)
    linear = take_over(model.model.model)
    assert len(linear) == 14 and take_over_mlps(model.model.model) == 2
    got, _ = run(model)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_saves_two_tensors_of_the_inner_width_instead_of_four():
    model = make()
    _, before = run(model)
    take_over(model.model.model)
    take_over_mlps(model.model.model)
    _, after = run(model)
    assert (before, after) == (2 * 4, 2 * 2)


def test_the_product_is_gone_after_the_forward(monkeypatch):
    model = make()
    take_over(model.model.model)
    take_over_mlps(model.model.model)
    products = []

    def remember(gate, up):
        product = silu_mul(gate, up)
        products.append(weakref.ref(product.untyped_storage()))
        return product

    monkeypatch.setattr("fastgfn.models.mlp.silu_mul", remember)
    out = model(input_ids=IDS).logits
    gc.collect()
    assert out.requires_grad and len(products) == 2 and all(p() is None for p in products)


class Scaled(LlamaMLP):
    def forward(self, x):
        return 1.1 * super().forward(x)


class Clamped(LlamaMLP):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Scaled, Clamped])
def test_leaves_an_mlp_that_computes_something_else(kind, dtype):
    model = make(dtype=dtype).model.model
    model.layers[0].mlp.__class__ = kind
    model.layers[1].mlp.act_fn = nn.SiLU()
    assert take_over_mlps(model) == 1 and "forward" not in model.layers[0].mlp.__dict__


def test_leaves_other_activations_and_forwards_of_an_instance():
    assert take_over_mlps(make(GemmaConfig).model.model) == 0
    model = make().model.model
    model.layers[0].mlp.forward = lambda x: x
    assert take_over_mlps(model) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2", "qwen3", "gemma2"])
def test_a_policy_is_pickled_with_what_stands_in_for_its_layers(family):
    policy = make_policy(family)
    again = pickle.loads(pickle.dumps(policy))
    nodes = torch.arange(1, 6)
    tree = nodes, nodes - 1, torch.full((5,), 5, dtype=torch.int32)
    with policy.merged(), again.merged():
        assert torch.equal(again.tree_hidden(*tree), policy.tree_hidden(*tree))
