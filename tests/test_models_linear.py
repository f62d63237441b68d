"""The linear layers of a policy go through the ops, and layers that the ops do not cover keep their own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fastgfn.models.linear import take_over

IDS = torch.arange(1, 9)[None]


def make(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=13, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        config = LlamaConfig(vocab_size=13, attention_bias=kind == "attention_bias", **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16 if kind == "bfloat16" else torch.float64)
    if kind != "trainable_base":
        model.requires_grad_(False)
    options = {
        "dora": dict(use_dora=True),
        "lora_bias": dict(lora_bias=True),
        "two_layers": dict(target_modules=["q_proj", "v_proj"]),
        "gpt2": dict(fan_in_fan_out=True),
        "rslora": dict(use_rslora=True),
    }.get(kind, {})
    if kind not in ("no_adapter", "trainable_base"):
        options = dict(target_modules="all-linear") | options
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def run(model):
    """Logits and the gradients of the trainable parameters."""
    out = model(input_ids=IDS).logits.double()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), trainable) if trainable else [])]


KINDS = {
    # kind -> (layers covered by the ops, layers)
    "plain": (14, 14),
    "attention_bias": (14, 14),
    "rslora": (14, 14),
    "two_layers": (14, 14),
    "gpt2": (8, 8),
    "no_adapter": (14, 14),
    "trainable_base": (0, 14),
    "dora": (0, 14),
    "lora_bias": (0, 14),
}


def backbone(model):
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(causal, causal.base_model_prefix)


def test_float32_adapters_of_a_bfloat16_base_are_as_exact_as_16_bits_are():
    """Distances of values and gradients from float64, against those of peft's layers all in 16 bits."""
    model = make("bfloat16")
    want, naive = run(make("bfloat16").double()), run(make("bfloat16").to(torch.bfloat16))
    layers = take_over(backbone(model))
    assert all(layer.is_covered and layer.lora[0].dtype == torch.float32 for layer in layers)
    for got, own, true in zip(run(model), naive, want, strict=True):
        assert got.dtype in (torch.float64, torch.float32)
        assert float((got - true).norm()) < 1.5 * float((own - true).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_stay_the_same(kind):
    model = make(kind)
    want = run(model)
    layers = take_over(backbone(model))
    assert (sum(layer.is_covered for layer in layers), len(layers)) == KINDS[kind]
    tolerance = 1e-12 if all(layer.is_covered for layer in layers) else 0
    for a, b in zip(run(model), want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if kind not in ("no_adapter", "trainable_base"):
        with model.disable_adapter(), torch.no_grad():
            off = model(input_ids=IDS).logits.double()
        assert not torch.allclose(off, want[0])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layers_give_the_same_logits_and_come_back(kind):
    model = make(kind)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        layers = take_over(backbone(model))
        before = {n: p.clone() for n, p in model.named_parameters()}
        for layer in layers:
            layer.merge()
        num_merged = len(layers) if kind == "bfloat16" else KINDS[kind][0]
        assert sum(layer.merged is not None for layer in layers) == num_merged
        tolerance = 0.05 if kind == "bfloat16" else 1e-10
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=tolerance, atol=tolerance)
        for layer in layers:
            layer.unmerge()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    for a, b in zip(run(model), run(make(kind)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_follows_what_peft_does_to_the_adapter():
    model = make("plain")
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        layers = take_over(backbone(model))
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
        for layer in layers:
            layer.merge()
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
        for layer in layers:
            layer.unmerge()
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
            for layer in layers:
                layer.merge()
            torch.testing.assert_close(model(input_ids=IDS).logits, base)
            for layer in layers:
                layer.unmerge()
        assert not torch.allclose(base, want)
        model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.set_adapter("other")
        torch.testing.assert_close(model(input_ids=IDS).logits, base)


def test_merged_weights_serve_only_what_they_were_made_for():
    model, plain = make("plain"), make("plain")
    layers = take_over(backbone(model))
    for layer in layers:
        layer.merge()
    # gradients, and the base without its adapter, are asked of the layers' own tensors
    for a, b in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["plain", "attention_bias", "gpt2"])
def test_merged_copies_may_be_of_a_lower_precision(kind, dtype):
    """Their products convert; what they return has the model's dtype."""
    model = make(kind).float()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        for layer in take_over(backbone(model)):
            layer.merge(dtype)
            assert layer.merged.weight.dtype == dtype
        got = model(input_ids=IDS).logits
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    tolerance = 0.2 if dtype == torch.float8_e4m3fn else 0.05
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_merged", [False, True])
def test_autocast_keeps_its_meaning(is_merged):
    model, plain = (make("plain").float() for _ in range(2))
    layers = take_over(backbone(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for layer in layers * is_merged:
            layer.merge()
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_hooks_inside_a_layer_are_called():
    model = make("plain")
    layers = take_over(backbone(model))
    layer, calls = layers[0].layer, []
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        model(input_ids=IDS)
        handle.remove()
    assert len(calls) == 4
    assert all(layer.is_covered for layer in layers)


class Subclass(torch.Tensor):
    pass


def test_subclasses_and_offloaded_weights_keep_their_own_forward():
    model = make("no_adapter")
    want = run(model)[0]
    layers = take_over(backbone(model))
    inner = layers[0].layer
    weight = inner.weight.data
    inner.weight = torch.nn.Parameter(weight.as_subclass(Subclass), requires_grad=False)
    assert not layers[0].is_covered
    torch.testing.assert_close(run(model)[0], want)
    # accelerate's offloading: the weight is a placeholder until the forward that it put there fetches it
    layers[1].layer.weight = torch.nn.Parameter(layers[1].layer.weight.to("meta"), requires_grad=False)
    layers[1].own_forward = lambda x: x @ saved.T
    saved = make("no_adapter").state_dict()["model.layers.0.self_attn.k_proj.weight"]
    assert layers[1].layer is backbone(model).layers[0].self_attn.k_proj
    torch.testing.assert_close(run(model)[0], want)
