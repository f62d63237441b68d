"""One adapter at many temperatures: what is computed, by whom, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fastgfn.checks import InputError
from fastgfn.models import Policy, condition, save_adapter
from fastgfn.models.adapter import read_conditioning
from fastgfn.packing import pack
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints

RANGE = (0.4, 1.2)
TEMPERATURES = (0.4, 0.55, 1.0, 1.2)
LIMITS = Constraints(0, min_length=1, max_length=7)
KINDS = ("adapter_scale", "split_scale")
SIZES = dict(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def _conditioned(tiny_policy, kind="adapter_scale", **options):
    policy = tiny_policy(**options)
    condition(policy, kind, RANGE)
    return policy


def _gains(kind, temperature, rank=4):
    scaled = torch.full((rank,), 1.0 / temperature - 1.0, dtype=torch.float64)
    if kind == "split_scale":
        scaled[: rank // 2] = 1.0
    return scaled


def _draw(policy, temperature=None, **options):
    options = dict(num_samples=6, seed=3, target_temperature=temperature) | options
    return sample([[1, 2], [3]], policy=policy, constraints=LIMITS, **options)


def _log_q(policy, tree):
    """Every log q of the tree, and the gradients of their sum of squares by parameter."""
    log_probs = score(tree, policy=policy)
    values = torch.cat([log_probs.log_pf, log_probs.log_pterm])
    named = dict(policy.parameters())
    gradients = torch.autograd.grad(values.square().sum(), list(named.values()))
    return values.detach(), dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_an_explicitly_scaled_adapter(tiny_policy, kind, family):
    """Of A' = diag(g) A, by autograd: the gradient of A is diag(g) times that of A'."""
    policy, explicit = _conditioned(tiny_policy, kind, family=family), tiny_policy(family=family)
    first = {name: p.detach().clone() for name, p in explicit.parameters()}
    for temperature in TEMPERATURES:
        gains = _gains(kind, temperature)[:, None]
        with torch.no_grad():
            for name, p in explicit.parameters():
                p.copy_(first[name] * gains if ".lora_A." in name else first[name])
        with policy.at_temperature(temperature):
            tree = pack(_draw(policy))
            values, gradients = _log_q(policy, tree)
        want_values, want = _log_q(explicit, tree)
        torch.testing.assert_close(values, want_values, rtol=1e-10, atol=1e-12)
        for name, gradient in want.items():
            expected = gradient * gains if ".lora_A." in name else gradient
            torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12)


def test_at_temperature_one_the_policy_is_the_base(tiny_policy):
    policy = _conditioned(tiny_policy, dtype=torch.float32)
    tree = pack(_draw(policy, 1.0))
    with policy.at_temperature(1.0), torch.no_grad():
        ours, base = score(tree, policy=policy), score(tree, policy=policy.reference)
        assert torch.equal(ours.log_pf, base.log_pf) and torch.equal(ours.log_pterm, base.log_pterm)
        with policy.at_temperature(0.5):
            assert not torch.allclose(score(tree, policy=policy).log_pf, base.log_pf, atol=0.1)
        assert torch.equal(score(tree, policy=policy).log_pf, base.log_pf)


@pytest.mark.parametrize("how", ["merged", "unmerged", "own forwards"])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_and_score_agree_at_every_temperature(tiny_policy, kind, how):
    """Under forced termination, below min_length and at max_length too; in few kernels where merged, and
    where the layers compute by themselves, as on a quantised base."""
    policy = _conditioned(tiny_policy, kind)
    for layer in policy.conditioning.layers * (how == "own forwards"):
        layer.base_layer.register_forward_hook(lambda *_: None)
    seen, merge = set(), how != "unmerged"
    for temperature in TEMPERATURES:
        rollouts = _draw(policy, temperature, merge=merge)
        tree = pack(rollouts)
        with policy.at_temperature(temperature), torch.no_grad():
            log_probs = score(tree, policy=policy)
        for n, z in enumerate(rollouts.sequences()):
            node, gap = int(tree.leaf[n]), []
            gap.append(log_probs.log_pterm[node] - rollouts.log_pterm[n, len(z)])
            for t in reversed(range(len(z))):
                gap.append(log_probs.log_pf[node] - rollouts.log_pf[n, t])
                node = int(tree.parent[node])
            assert float(torch.stack(gap).abs().max()) < 1e-5
        seen.add(str(rollouts.sequences()))
    assert len(seen) > 1


def _refuses_another(policy):
    with pytest.raises(InputError, match="the adapter must be unmerged, got merged at another temperature"):
        with policy.at_temperature(0.7):
            pass


def test_what_peft_computes_is_the_same_policy(tiny_policy):
    """Its forwards, under autocast too, and its merging."""
    policy, ids = _conditioned(tiny_policy, "split_scale"), torch.arange(1, 9)[None]

    def plain():
        with policy.plain() as model, torch.no_grad():
            return model(input_ids=ids).logits

    for temperature in (0.45, 1.1):
        with policy.at_temperature(temperature):
            got = plain()
            policy.model.merge_adapter()
            merged = plain()
            _refuses_another(policy)
            policy.model.unmerge_adapter()
            with policy.merged():
                _refuses_another(policy)
            tree = pack(_draw(policy))
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                cast = score(tree, policy=policy).log_pf
            with torch.no_grad():
                exact = score(tree, policy=policy).log_pf
        torch.testing.assert_close(merged, got, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cast.double(), exact, rtol=0.1, atol=0.1)


def test_a_graph_reads_the_same_memory_at_every_temperature(tiny_policy):
    policy = _conditioned(tiny_policy)
    with policy.at_temperature(0.4):
        first = policy.addresses()
    with policy.at_temperature(1.1):
        assert policy.addresses() == first


def test_another_temperature_between_forward_and_backward_is_refused(tiny_policy):
    policy = _conditioned(tiny_policy)
    with policy.at_temperature(0.5):
        tree = pack(_draw(policy))
        loss = score(tree, policy=policy).log_pf.sum()
        loss.backward(retain_graph=True)
        with policy.at_temperature(0.5):
            loss.backward(retain_graph=True)
        with policy.at_temperature(0.6), pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


def _model():
    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation="fastgfn")


def _with_adapter(**options):
    options = dict(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM") | options
    return Policy(get_peft_model(_model(), LoraConfig(**options)))


@pytest.fixture
def trained():
    policy = _with_adapter(init_lora_weights=False)
    condition(policy, "split_scale", RANGE)
    return policy


def test_the_conditioning_travels_with_the_adapter(trained, tmp_path):
    save_adapter(trained, tmp_path)
    assert json.loads((tmp_path / "conditioning.json").read_text()) == {
        "kind": "split_scale",
        "temperatures": [0.4, 1.2],
    }
    loaded = Policy(PeftModel.from_pretrained(_model(), str(tmp_path), is_trainable=True))
    read_conditioning(loaded, tmp_path)
    assert loaded.conditioning.to_dict() == trained.conditioning.to_dict()
    for temperature in (0.4, 0.9):
        assert _draw(loaded, temperature).sequences() == _draw(trained, temperature).sequences()
    # peft alone has no gains: T = 0.5, at which they are 1
    alone = Policy(PeftModel.from_pretrained(_model(), str(tmp_path)))
    assert _draw(alone).sequences() == _draw(trained, 0.5).sequences()
    (tmp_path / "conditioning.json").write_text('{"kind": "split_scale"}')
    with pytest.raises(InputError, match="conditioning.json must be a kind and two temperatures, got .*Key"):
        read_conditioning(alone, tmp_path)


def test_one_temperature_can_be_saved_as_an_ordinary_adapter(trained, tmp_path):
    save_adapter(trained, tmp_path)
    save_adapter(trained, tmp_path, temperature=0.8)
    assert not (tmp_path / "conditioning.json").exists() and trained.conditioning.temperature is None
    alone = Policy(PeftModel.from_pretrained(_model(), str(tmp_path)))
    tree = pack(_draw(trained, 0.8))
    with trained.at_temperature(0.8), torch.no_grad():
        assert torch.equal(score(tree, policy=alone).log_pf, score(tree, policy=trained).log_pf)


def test_refuses_temperatures(tiny_policy):
    policy = _conditioned(tiny_policy)
    for bad in (0.39, 1.21, 0.0, -1.0, float("nan"), float("inf"), "0.5", None, True):
        with pytest.raises(InputError, match=r"at_temperature: temperature must be"):
            with policy.at_temperature(bad):
                pass
    with pytest.raises(InputError, match=r"in the trained range \[0.4, 1.2\], got 1.5; train with another"):
        _draw(policy, 1.5)
    with pytest.raises(InputError, match="policy must be conditioned on the temperature, got one"):
        _draw(tiny_policy(), 0.5)
    for merge in (True, False):
        with pytest.raises(InputError, match="temperature of a conditioned adapter.*target_temperature=T"):
            _draw(policy, merge=merge)
    tree = pack(_draw(policy, 0.5))
    with pytest.raises(InputError, match="temperature of a conditioned adapter"):
        score(tree, policy=policy)
    # the base has no temperature
    assert bool(score(tree, policy=policy.reference).log_pf.isfinite().all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (None, "policy must be of one plain LoRA adapter, got one without adapter"),
        (dict(use_dora=True), "policy must be of one plain LoRA adapter"),
        (dict(lora_bias=True), "every trainable weight must be LoRA's A or B, got .*bias"),
        (dict(r=1), "the rank must be >= 2 with kind='split_scale', got 1"),
    ],
)
def test_refuses_adapters_that_cannot_see_the_temperature(options, match):
    policy = Policy(_model()) if options is None else _with_adapter(**options)
    with pytest.raises(InputError, match=match):
        condition(policy, "split_scale", RANGE)
    assert policy.conditioning is None


def test_refuses_a_second_conditioning_and_bad_ranges(tiny_policy):
    policy = tiny_policy()
    with pytest.raises(InputError, match="kind must be one of .*got 'prompt'"):
        condition(policy, "prompt", RANGE)
    for bad in ((0.0, 1.0), (1.0, 0.5), (0.5, float("inf")), (0.5, 0.5)):
        with pytest.raises(InputError, match="temperatures must be 0 < lowest < highest"):
            condition(policy, "adapter_scale", bad)
    condition(policy, "adapter_scale", RANGE)
    with pytest.raises(InputError, match="policy must be not conditioned yet"):
        condition(policy, "adapter_scale", RANGE)
