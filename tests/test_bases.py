"""Bases other than frozen floating-point weights: full fine-tuning, and quantised linear layers."""

from types import SimpleNamespace

import pytest
import torch
from family_models import make_model, make_policy, path_to
from torch import nn

from fastgfn.checks import InputError
from fastgfn.models import Policy
from fastgfn.models.load import add_adapter
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, log_reward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 3]]
CONSTRAINTS = Constraints(0, max_length=6)


def weights(n, size):
    """Of log_pf and log_pterm along trajectory n."""
    g = torch.Generator().manual_seed(n)
    return torch.randn(2, size + 1, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-scaled", "gemma2", "gptj", "phi"])
def test_full_fine_tuning_has_the_gradients_of_plain_transformers(family):
    """Of every weight: head, embeddings (tied ones as well), norms and biases among them."""
    policy = make_policy(family, trainable=True)
    rollouts = sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=4, seed=1)
    tree = pack(rollouts)
    scored = score(tree, policy=policy)
    plain = make_model(family, "plain")
    got_loss = want_loss = 0.0
    for n, sequence in enumerate(rollouts.sequences()):
        prompt, size = PROMPTS[int(rollouts.group[n])], len(sequence)
        on_pf, on_stop = weights(n, size)
        nodes = path_to(tree, int(tree.leaf[n]))[len(prompt) - 1 :]
        own = scored.log_pf[nodes[1:]]
        torch.testing.assert_close(own.detach().float(), rollouts.log_pf[n, :size], rtol=0, atol=1e-5)
        got_loss += (on_pf[:size] * own).sum() + (on_stop * scored.log_pterm[nodes]).sum()
        logits = plain(input_ids=torch.tensor([prompt + sequence]), use_cache=False).logits[0]
        log_p = logits[len(prompt) - 1 :].log_softmax(-1)
        drawn = log_p[torch.arange(size), torch.tensor(sequence, dtype=torch.int64)]
        stops = log_p[: CONSTRAINTS.max_length, 0]
        want_loss += (on_pf[:size] * drawn).sum() + (on_stop[: len(stops)] * stops).sum()
    names, parameters = zip(*policy.parameters(), strict=True)
    assert names == tuple(name for name, _ in plain.named_parameters())
    got = torch.autograd.grad(got_loss, parameters)
    want = torch.autograd.grad(want_loss, list(plain.parameters()))
    # the others take their norms or their softmax in float32
    bound = 1e-10 if family in ("gpt2-scaled", "phi") else 1e-5
    for name, a, b in zip(names, got, want, strict=True):
        scale = float(b.abs().max())
        if "k_proj.bias" not in name:  # no softmax sees it
            assert scale > 0, name
        torch.testing.assert_close(
            a, b, rtol=0, atol=bound * max(1.0, scale), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_full_fine_tuning_leaves_no_reference():
    policy = make_policy("llama", trainable=True)
    want = "model must be a LoRA adapter or frozen weights, got trainable base weights; use load_policy"
    with pytest.raises(InputError, match=f"Policy.reference: {want}"):
        _ = policy.reference


class Linear4bit(nn.Linear):
    """Two 4-bit numbers per byte, one scale per row; as with bitsandbytes, `weight` is no matrix."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = layer.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 7
        levels = (weight / self.scale).round().add(8).to(torch.uint8)
        packed = (levels[:, ::2] << 4 | levels[:, 1::2]).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.calls = 0

    def dequantised(self):
        packed = self.weight.view(self.out_features, -1)
        levels = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1)
        return (levels.to(self.scale.dtype) - 8) * self.scale

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


def quantise(model, of=nn.Linear, keep=("lm_head",)):
    """The modules in whose place a Linear4bit now is."""
    new = []
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is of and name not in keep:
                setattr(parent, name, Linear4bit(layer))
                new.append(getattr(parent, name))
    return new


def with_adapter(model):
    """A policy whose adapter is far from zero."""
    torch.manual_seed(4)
    adapted = add_adapter(model.requires_grad_(False), rank=2, alpha=2.0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return Policy(adapted)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_quantised_base_gives_what_its_dequantised_weights_give(family):
    packed, plain = (make_model(family, "fastgfn", torch.float32) for _ in range(2))
    layers = quantise(packed)
    assert len(layers) == {"llama": 14, "gptj": 12}[family]
    for layer, name in zip(layers, [n for n, m in packed.named_modules() if m in set(layers)], strict=True):
        plain.get_submodule(name).weight.data = layer.dequantised()
    found = []
    for model in (packed, plain):
        policy = with_adapter(model)
        assert policy.num_linear_weights == sum(m.in_features * m.out_features for m in layers)
        rollouts = sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=5, seed=2)
        tree = pack(rollouts)
        scored = score(tree, policy=policy)
        reward = log_reward(tree, reward=LMReward(policy.reference))
        loss = scored.log_pf.sum() + scored.log_pterm.square().sum()
        grads = torch.autograd.grad(loss, [p for _, p in policy.parameters()])
        found.append((rollouts, scored, reward, grads))
        for n, size in enumerate(rollouts.lengths.tolist()):
            nodes = path_to(tree, int(tree.leaf[n]))[-size:] if size else []
            own = scored.log_pf[nodes].detach()
            torch.testing.assert_close(own, rollouts.log_pf[n, :size], rtol=0, atol=1e-5)
    (drawn, a, reward, grads), (want_drawn, b, want_reward, want_grads) = found
    assert drawn.sequences() == want_drawn.sequences()
    for got, want in (
        (drawn.log_behavior, want_drawn.log_behavior),
        (a.log_pf, b.log_pf),
        (a.log_pterm, b.log_pterm),
        (reward, want_reward),
        *zip(grads, want_grads, strict=True),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    # the probe, sampling, score and reward went through the layer's own forward
    assert min(layer.calls for layer in layers) > 8
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)


def test_a_quantised_head_is_refused():
    model = make_model("phi", "fastgfn", torch.float32).requires_grad_(False)
    assert len(quantise(model, keep=())) == 13
    want = (
        "the output head must be a linear layer of floating-point weights, got Linear4bit; leave the head out"
    )
    with pytest.raises(InputError, match=f"Policy: {want} of the quantisation"):
        Policy(model)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_an_adapted_head_is_refused(option):
    from peft import LoraConfig, get_peft_model

    model = make_model("phi", "fastgfn", torch.float32)
    options = dict(target_modules=["q_proj"]) | {option: ["lm_head"]}
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(
        InputError, match="the output head must be a plain linear layer, got .*target_modules"
    ):
        Policy(model)


class Repacking(Linear4bit):
    """As bitsandbytes does on a CPU with AVX512-BF16: the first pass in eval() packs the weight for products
    without gradient."""

    def __init__(self, layer):
        super().__init__(layer)
        self.support_avx512bf16_for_cpu = True
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)

    def forward(self, x):
        state = self.weight.quant_state
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            state.packing_format_for_cpu = True
        return super().forward(x.detach() if state.packing_format_for_cpu else x)


def test_a_quantised_base_keeps_the_layout_that_has_gradients(monkeypatch):
    monkeypatch.setitem(globals(), "Linear4bit", Repacking)
    models = [make_model("llama", "fastgfn", torch.float32) for _ in range(3)]
    layers = [quantise(model) for model in models]
    for layer in layers[1]:
        layer.support_avx512bf16_for_cpu = False
    found = []
    for model in models[:2]:
        policy = with_adapter(model)
        tree = pack(sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=5, seed=2))
        loss = score(tree, policy=policy).log_pf.sum()
        found.append(torch.autograd.grad(loss, [p for _, p in policy.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    layers[2][3].eval()(torch.zeros(1, layers[2][3].in_features))
    with pytest.raises(InputError, match="must be as it was loaded, got 4-bit weights packed for inference"):
        with_adapter(models[2])
