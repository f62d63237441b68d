from types import SimpleNamespace

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.rollout import sample
from fastgfn.testing import assert_fits
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [4, 5]]


def _rows(rollouts):
    return list(zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True))


def _plain_log_density(policy, prompt, sequence, constraints, temperature):
    """log-density of the sampler for one sequence, one full forward per prefix."""
    model, stop = policy.model, constraints.termination_token_id
    total = 0.0
    for k in range(len(sequence) + 1):
        if k == constraints.max_length:
            break
        ids = torch.tensor([prompt + sequence[:k]])
        attention = _tree_attention(ids.shape[1])
        logits = model(input_ids=ids, use_cache=False, attention=attention).logits[0, -1].float()
        if constraints.logit_bias is not None:
            logits = logits + constraints.logit_bias
        if k < constraints.min_length:
            logits[stop] = -torch.inf
        token = sequence[k] if k < len(sequence) else stop
        total += float((logits / temperature).log_softmax(-1)[token])
    return total


def _tree_attention(size):
    from fastgfn.attention import TreeAttention
    from fastgfn.ops.attention import TreeMask

    return TreeAttention(TreeMask(torch.full((size,), size), torch.arange(size)))


@pytest.mark.parametrize("min_length", [0, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "masked"])
def test_log_behavior_is_the_density_that_drew_the_sequence(tiny_policy, min_length, masked):
    policy = tiny_policy()
    bias = torch.where(torch.arange(13) < 6, 0.0, -99.0) if masked else None
    constraints = Constraints(0, min_length=min_length, max_length=5, logit_bias=bias)
    temperature = torch.tensor([1.0, 0.7, 1.5, 1.0] * 2)
    rollouts = sample(
        PROMPTS, policy=policy, constraints=constraints, num_samples=4, temperature=temperature, seed=3
    )
    for n, (group, sequence) in enumerate(_rows(rollouts)):
        want = _plain_log_density(policy, PROMPTS[group], list(sequence), constraints, float(temperature[n]))
        assert float(rollouts.log_behavior[n]) == pytest.approx(want, abs=1e-4)
        assert min_length <= len(sequence) <= 5 and 0 not in sequence
        assert not masked or max(sequence, default=0) < 6


def test_draws_do_not_depend_on_the_batch(tiny_policy):
    policy = tiny_policy()
    constraints = Constraints(0, max_length=6)
    common = dict(policy=policy, constraints=constraints, seed=11)
    together = _rows(sample(PROMPTS, num_samples=8, **common))
    first = _rows(sample(PROMPTS[:1], num_samples=8, **common))
    second = _rows(sample(PROMPTS[1:], num_samples=8, first_trajectory=8, **common))
    assert [s for _, s in together] == [s for _, s in first] + [s for _, s in second]
    alone = [_rows(sample(PROMPTS[:1], num_samples=1, first_trajectory=i, **common))[0] for i in range(8)]
    assert alone == first
    assert len({s for _, s in together}) > 4


def test_a_merged_adapter_draws_the_same_tokens_and_leaves_the_weights(tiny_policy, monkeypatch):
    policy = tiny_policy()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    rows = []
    for merge_from in (1, 100):
        monkeypatch.setattr("fastgfn.rollout.sampling.MERGE_FROM", merge_from)
        options = dict(policy=policy, constraints=Constraints(0, max_length=6), num_samples=16, seed=9)
        rows.append(_rows(sample(PROMPTS, **options)))
    assert rows[0] == rows[1]
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n, p in before.items())


@pytest.mark.parametrize("kind", ["dora", "bias", "bfloat16"])
def test_what_cannot_be_merged_exactly_is_sampled_unmerged(kind):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fastgfn.models import Policy
    from fastgfn.packing import pack
    from fastgfn.scoring import score

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=13, **sizes), attn_implementation="fastgfn"
    )
    extra = {"dora": dict(use_dora=True), "bias": dict(lora_bias=True), "bfloat16": {}}[kind]
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **extra)
    policy = Policy(get_peft_model(model.to(dtype), lora))
    with torch.no_grad():
        for _, p in policy.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    constraints = Constraints(0, max_length=14)
    rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=4, seed=2)
    tree = pack(rollouts)
    log_probs = score(tree, policy=policy)
    from fastgfn.ops.scan import tree_cumsum

    density = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm)[tree.leaf].detach()
    bound = 0.3 if kind == "bfloat16" else 1e-4
    assert float((density - rollouts.log_behavior).abs().max()) < bound


def test_sampled_and_scored_densities_agree_however_eager_the_stop(tiny_policy):
    """Below min_length the stop's probability may be 1 - 1e-9; the renormalised density must survive that."""
    from fastgfn.ops.scan import tree_cumsum
    from fastgfn.packing import pack
    from fastgfn.scoring import score

    policy = tiny_policy(dtype=torch.float32)
    for push in (6.0, 14.0, 40.0):
        bias = torch.zeros(13).index_fill(0, torch.tensor([0]), push)
        constraints = Constraints(0, min_length=3, max_length=5, logit_bias=bias)
        rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=4, seed=2)
        tree = pack(rollouts)
        log_probs = score(tree, policy=policy)
        density = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm)[tree.leaf].detach()
        torch.testing.assert_close(density, rollouts.log_behavior, rtol=0, atol=2e-5)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_policy):
    policy = tiny_policy()
    options = dict(policy=policy, constraints=Constraints(0, max_length=6), num_samples=16)
    a, b, c = (sample(PROMPTS, seed=s, **options) for s in (1, 1, 2))
    assert _rows(a) == _rows(b) and torch.equal(a.log_behavior, b.log_behavior)
    assert _rows(a) != _rows(c)


def test_samples_follow_the_exact_distribution(tiny_policy):
    """Chi-squared over all sequences of an enumerable set (fixed seed, p > 1e-3)."""
    from itertools import product

    vocab, draws = 4, 20000
    policy = tiny_policy(vocab=vocab)
    constraints = Constraints(0, max_length=3)
    space = [list(z) for k in range(4) for z in product(range(1, vocab), repeat=k)]
    log_q = torch.tensor([_plain_log_density(policy, [1, 2], z, constraints, 1.0) for z in space])
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    rollouts = sample([[1, 2]], policy=policy, constraints=constraints, num_samples=draws, seed=5)
    place = {tuple(z): i for i, z in enumerate(space)}
    drawn = torch.tensor([place[z] for _, z in _rows(rollouts)])
    assert_fits(torch.bincount(drawn, minlength=len(space)), log_q.exp())


def test_forced_and_own_draw_alike(tiny_policy):
    """The convention changes what is scored, never what is drawn."""
    policy = tiny_policy()
    rows = [
        _rows(
            sample(
                PROMPTS,
                policy=policy,
                constraints=Constraints(0, min_length=1, max_length=3, termination=convention),
                num_samples=8,
            )
        )
        for convention in ("forced", "own")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            [[1] * 60],
            {},
            r"sample: prompts\[0\] must be at most 64 - max_length = 58 tokens, got 60; shorten",
        ),
        ([[]], {}, r"prompts\[0\] must be a non-empty list"),
        ([], {}, "prompts must be at least one prompt"),
        ([[99]], {}, r"prompts\[0\] must be ids in \[0, 13\), got \(99, 99\)"),
        ([[1]], {"temperature": 0.0}, "temperature must be > 0"),
        ([[1]], {"constraints": Constraints(13)}, r"termination_token_id must be in \[0, 13\), got 13"),
        ([[1]], {"num_samples": 0}, "num_samples must be >= 1"),
    ],
)
def test_refuses_bad_input(tiny_policy, prompts, options, message):
    defaults = dict(constraints=Constraints(0, max_length=6), num_samples=2)
    with pytest.raises(InputError, match=message):
        sample(prompts, policy=tiny_policy(), **(defaults | options))


@pytest.mark.parametrize(
    "others", [dict(bos_token_id=1, eos_token_id=0), dict(bos_token_id=None, eos_token_id=9)]
)
def test_a_prompt_of_pad_tokens_is_refused_where_they_only_pad(tiny_policy, others):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=1)
    policy.tokenizer = SimpleNamespace(pad_token_id=9, **others)
    sample([[9, 1]], policy=policy, **options)
    if 9 in others.values():
        sample([[9]], policy=policy, **options)
    else:
        with pytest.raises(
            InputError, match=r"prompts\[1\] must be text, got pad tokens alone; pass prompts"
        ):
            sample([[1], [9, 9]], policy=policy, **options)


@pytest.mark.parametrize("kind", ["mask", "below_min_length"])
def test_a_mask_that_forbids_everything_is_refused(tiny_policy, kind):
    bias = torch.full((13,), -torch.inf)
    if kind == "below_min_length":
        bias[0] = 0.0
    constraints = Constraints(0, min_length=1, max_length=3, logit_bias=bias)
    with pytest.raises(InputError, match="a token above -inf per row|widen the vocabulary mask"):
        sample([[1]], policy=tiny_policy(), constraints=constraints, num_samples=1)


def test_constraints_refuse_contradicting_limits():
    with pytest.raises(InputError, match="max_length must be >= max.1, min_length. = 5, got 4"):
        Constraints(0, min_length=5, max_length=4)
