"""The published loop of the benches equals a direct per-sequence computation, and the original if given."""

import importlib.util
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from fastgfn.testing import relative_error

STOP, VOCAB, PROMPT = 3, 61, (7, 3, 11, 20)
# Ragged: one token, the maximum (no room for a stop), the maximum minus one, a duplicate, none.
ROWS = ([5], [9, 8, 7, 6, 5], [9, 8, 7, 12], [9, 8, 7, 12], [])
MAX_LENGTH = 5


@pytest.fixture(scope="module")
def loop():
    path = Path(__file__).parent.parent / "bench" / "published_loop.py"
    spec = importlib.util.spec_from_file_location("published_loop", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    # These matrices are too small to share out: waiting for a second busy core takes most of the time.
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


def tiny_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    # 1 / sqrt(width), so that tokens, prefixes and the two policies differ by about a nat.
    spread = dict(vocab_size=VOCAB, initializer_range=0.25)
    if family == "gpt2":
        size = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32)
        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **spread, **size, **no_dropout)
        base = transformers.GPT2LMHeadModel(config)
    else:
        size = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16)
        config = transformers.LlamaConfig(intermediate_size=24, **spread, **size)
        base = transformers.LlamaForCausalLM(config)
    adapters = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    return peft.get_peft_model(base, adapters).eval()


def forced(rows=ROWS) -> torch.Tensor:
    return torch.tensor([row + [STOP] * (MAX_LENGTH - len(row)) for row in rows])


def adapter_gradients(model, loss) -> torch.Tensor:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable)])


def direct_loss(model, rows, min_length: int, subtb_lambda: float, reward_temperature: float):
    """One teacher-forced forward per sequence, one term per pair of prefixes."""
    numerator, denominator = 0.0, 0.0
    for row in rows:
        text = torch.tensor([[*PROMPT, *row]])
        policy = model(text).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            base = model(text).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
        residual = []
        for k in range(len(row) + 1):
            log_q = policy[k, STOP] + sum(policy[t, row[t]] for t in range(k))
            log_r = base[k, STOP] + sum(base[t, row[t]] for t in range(k))
            if k < min_length:
                log_r = torch.tensor(-99.0)
            residual.append(log_q - log_r / reward_temperature)
        for j in range(len(residual)):
            for i in range(j):
                weight = subtb_lambda ** (j - i - 1)
                numerator = numerator + weight * (residual[j] - residual[i]) ** 2
                denominator += weight
    return numerator / denominator


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "min_length, subtb_lambda, temperature", [(0, 1.0, 1.0), (1, 1.0, 1.0), (2, 0.9, 0.8)]
)
def test_micro_step_equals_a_direct_computation(loop, family, min_length, subtb_lambda, temperature):
    model = tiny_model(family)
    limits = loop.Limits(STOP, min_length, MAX_LENGTH)
    loss, tokens = loop.micro_step(
        model,
        torch.tensor(PROMPT),
        limits,
        num_samples=len(ROWS),
        reward_temperature=temperature,
        subtb_lambda=subtb_lambda,
        action_seq=forced(),
    )
    want = direct_loss(model, ROWS, min_length, subtb_lambda, temperature)
    assert tokens[:, :MAX_LENGTH].equal(forced())
    assert float(want.detach()) > 0.1
    assert relative_error(loss.detach(), want.detach()) <= 1e-5
    assert relative_error(adapter_gradients(model, loss), adapter_gradients(model, want)) <= 1e-5


def test_sampling_respects_the_limits_and_scores_its_own_tokens(loop):
    model = tiny_model("llama")
    limits = loop.Limits(STOP, min_length=2, max_length=MAX_LENGTH)
    prompts = torch.tensor(PROMPT).expand(200, -1)
    drawn = loop.decode(model, prompts, limits)
    again = loop.decode(model, prompts, limits, action_seq=drawn.tokens)
    lengths = (drawn.tokens == STOP).int().argmax(1)
    assert lengths.min() == 2 and lengths.max() == MAX_LENGTH
    assert (drawn.tokens == STOP).any(1).all()
    assert drawn.log_pf.equal(again.log_pf) and drawn.log_pterm.equal(again.log_pterm)


def test_sampling_follows_the_policy(loop):
    model = tiny_model("gpt2")
    prompts = torch.tensor(PROMPT).expand(20_000, -1)
    with torch.no_grad():
        expected = model(prompts[:1]).logits[0, -1].softmax(-1) * len(prompts)
        first = loop.decode(model, prompts, loop.Limits(STOP, 0, 1)).tokens[:, 0]
    count = torch.bincount(first, minlength=VOCAB)
    kept = expected >= 5
    chi_squared = ((count - expected) ** 2 / expected)[kept].sum()
    degrees = int(kept.sum()) - 1
    # 99.9% point of chi-squared (Wilson-Hilferty).
    assert chi_squared < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_batch_without_a_transition_is_refused(loop):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="windowed_loss: tokens must be at least 2 wide, got 1"):
        loop.micro_step(
            model,
            torch.tensor(PROMPT),
            loop.Limits(STOP, 0, MAX_LENGTH),
            num_samples=1,
            action_seq=torch.tensor([[STOP]]),
        )


@pytest.mark.skipif("FASTGFN_PUBLISHED" not in os.environ, reason="needs a copy of next_sentence")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("min_length", [0, 1])
def test_micro_step_equals_the_original(loop, family, min_length):
    model = tiny_model(family)
    utils = loop.load_original(os.environ["FASTGFN_PUBLISHED"])
    prompt, limits = torch.tensor(PROMPT), loop.Limits(STOP, min_length, MAX_LENGTH)
    settings = dict(num_samples=len(ROWS), action_seq=forced())
    want, want_tokens = loop.original_micro_step(utils, model, prompt, limits, **settings)
    want_grad = adapter_gradients(model, want)
    loss, tokens = loop.micro_step(model, prompt, limits, **settings)
    assert tokens.equal(want_tokens)
    errors = [
        relative_error(loss.detach(), want.detach()),
        relative_error(adapter_gradients(model, loss), want_grad),
    ]
    print(f"{family} min_length {min_length}: loss {errors[0]:.2e}, adapter gradients {errors[1]:.2e}")
    assert max(errors) <= 1e-5


def test_the_loop_runs_the_plain_model(loop, tiny_policy):
    policy = tiny_policy()
    assert any("forward" in module.__dict__ for module in policy.model.modules())
    loop.restore_plain(policy.model)
    assert not any("forward" in module.__dict__ for module in policy.model.modules())
    assert policy.config._attn_implementation == "sdpa"
