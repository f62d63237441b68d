"""Drafts: they change no draw, whoever makes them; what a draft model shares, keeps and refuses."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fastgfn.attention import TreeAttention
from fastgfn.checks import InputError
from fastgfn.models import Policy
from fastgfn.rollout import (
    Drafts,
    ModelDrafts,
    PromptLookup,
    SamplingOptions,
    engine,
    sample,
)  # fmt: skip
from fastgfn.rollout import (
    drafts as drafting,
)
from fastgfn.testing import assert_fits
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3, 1, 2]]


def rows(rollouts):
    return list(zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True))


def assert_same(got, want):
    assert rows(got) == rows(want)
    for name in ("is_action", "terminated"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    for name in ("log_behavior", "log_pf", "log_pterm"):
        have, true = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(have, true, rtol=0, atol=1e-5, equal_nan=True)


def with_adapter(policy, scale):
    """The policy, its adapter's B scaled: how far it is from its reference."""
    with torch.no_grad():
        for name, p in policy.parameters():
            if "lora_B" in name:
                p.mul_(scale)
    return policy


class EvenThenOdd:
    """An even token first, then odd ones; it stops only after an odd one. 0 is the termination token."""

    def allowed(self, sequences):
        tokens = torch.arange(13)
        out = torch.zeros(len(sequences), 13, dtype=torch.bool)
        for row, z in zip(out, sequences, strict=True):
            row[(tokens % 2 == (len(z) > 0)) & (tokens > 0)] = True
            row[0] = len(z) > 1
        return out


BIAS = torch.zeros(13).index_fill_(0, torch.tensor([3, 8]), -99.0)
SETTINGS = {
    "plain": {},
    "cold": dict(temperature=0.3),
    "hot": dict(temperature=2.0, first_trajectory=10**12),
    "mixed": dict(temperature=torch.linspace(0.4, 3.0, 15)),
    "limits": dict(constraints=Constraints(0, 4, 6, logit_bias=BIAS)),
    "own": dict(constraints=Constraints(0, 3, 6, termination="own")),
    "two_stops": dict(constraints=Constraints(0, 1, 7, extra_termination_token_ids=(5,))),
    "filters": dict(options=SamplingOptions(top_k=5, top_p=0.9, min_p=0.01)),
    "epsilon": dict(options=SamplingOptions(epsilon=0.4)),
    "prefixes": dict(options=SamplingOptions(prefixes=[[2, 1]] * 4 + [[]] * 8 + [[3] * 6] * 3)),
    "grammar": dict(grammar=EvenThenOdd()),
    "tool": dict(tool=lambda i, z: [3, 4, 3] if z[-1] % 3 == 0 and i % 2 == 0 else None),
}


@pytest.mark.parametrize("batch_size", [None, 4, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_model_drafts_change_no_draw(tiny_policy, name, batch_size):
    policy = with_adapter(tiny_policy(), 0.3)
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5, seed=6) | SETTINGS[name]
    want = sample(PROMPTS, **options)
    for model in (policy.reference, tiny_policy(family="gpt2")):
        drafts = Drafts(ModelDrafts(model), 3)
        assert_same(sample(PROMPTS, drafts=drafts, batch_size=batch_size, **options), want)
        assert 0 < drafts.accepted <= drafts.offered


@pytest.mark.parametrize("source", ["lookup", "base"])
def test_drafted_draws_follow_the_distribution(tiny_policy, source):
    """Chi-squared over all sequences at 100,000 draws; 2 tests at 5e-4 keep the family at 1e-3."""
    policy, constraints, draws = tiny_policy(vocab=5), Constraints(0, 1, 3), 100_000
    drafts = Drafts(PromptLookup() if source == "lookup" else ModelDrafts(policy.reference), 2)
    rollouts = sample(
        [[1, 2]], policy=policy, constraints=constraints, num_samples=draws, temperature=1.4, seed=3,
        drafts=drafts, batch_size=7_000,
    )  # fmt: skip
    with policy.plain() as model, torch.no_grad():
        p = {}
        for z in (z for k in range(1, 4) for z in product(range(1, 5), repeat=k)):
            steps = model(torch.tensor([[1, 2, *z]]), use_cache=False).logits[0, 1:].double() / 1.4
            steps[0, 0] = -torch.inf
            log_p = steps.log_softmax(-1)
            drawn = [*z, 0][:3]
            p[z] = float(log_p[range(len(drawn)), drawn].sum())
    assert drafts.offered > 20
    place = {z: i for i, z in enumerate(p)}
    drawn = torch.tensor([place[z] for _, z in rows(rollouts)])
    want = torch.tensor(list(p.values()), dtype=torch.float64).exp()
    assert float(want.sum()) == pytest.approx(1.0, abs=1e-6)
    assert_fits(torch.bincount(drawn, minlength=len(p)), want, level=5e-4)


@pytest.mark.parametrize("name", ["plain", "mixed", "limits", "two_stops", "epsilon", "filters"])
@pytest.mark.parametrize("merge", [True, False])
def test_every_draft_of_the_policy_itself_is_accepted(tiny_policy, monkeypatch, name, merge):
    policy, passes, step = tiny_policy(), [], engine.Engine._forward
    monkeypatch.setattr(engine.Engine, "_forward", lambda *args: passes.append(1) or step(*args))
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5, seed=6, merge=merge)
    options |= SETTINGS[name]
    sample(PROMPTS, **options)
    without = len(passes)
    drafts = Drafts(ModelDrafts(policy), 3)
    del passes[:]
    sample(PROMPTS, drafts=drafts, **options)
    assert drafts.acceptance == 1.0 and drafts.offered > 20 and len(passes) < without


def test_a_single_trajectory_takes_a_pass_per_draft(tiny_policy, monkeypatch):
    """Of 17 tokens the prompt's pass draws one, and every further pass 4."""
    policy, passes, step = tiny_policy(), [], engine.Engine._forward
    monkeypatch.setattr(engine.Engine, "_forward", lambda *args: passes.append(1) or step(*args))
    drafts = Drafts(ModelDrafts(policy), 3)
    constraints = Constraints(0, 17, 17)
    sample([[1]], policy=policy, constraints=constraints, num_samples=1, drafts=drafts)
    assert len(passes) == 4 and drafts.accepted == drafts.offered == 12


class Greedy(ModelDrafts):
    """Drafts of the likeliest tokens of the model."""

    def begin(self, *batch):
        drafter = super().begin(*batch)
        weight, limits = self.model.head.weight, drafter.drawer.constraints

        def likeliest(hidden, rows, temperature, trajectory, position):
            logits = hidden @ weight.T
            logits[position < limits.min_length, 0] = -torch.inf
            return SimpleNamespace(token=logits.argmax(-1))

        drafter.drawer = likeliest
        likeliest.constraints, likeliest.device = limits, weight.device
        return drafter


def test_a_nearby_model_agrees_more_often_with_shared_noise(tiny_policy):
    policy = with_adapter(tiny_policy(), 0.1)
    options = dict(policy=policy, constraints=Constraints(0, 4, 12), num_samples=30, seed=1)
    found = {}
    for kind in (ModelDrafts, Greedy):
        drafts = Drafts(kind(policy.reference), 3)
        sample(PROMPTS, drafts=drafts, **options)
        found[kind] = drafts.acceptance
    assert 0.6 < found[ModelDrafts] < 1 and found[Greedy] < found[ModelDrafts] - 0.3


@pytest.fixture
def drafters(monkeypatch):
    """The drafters of models that `sample` makes, in order."""
    made = []

    class Kept(drafting.ModelDrafter):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(drafting, "ModelDrafter", Kept)
    return made


@pytest.mark.parametrize("most", [4096, 5])
def test_kept_keys_and_values_draft_as_whole_prefixes_do(tiny_policy, monkeypatch, most):
    """Every draft again, by one forward over prompt, Z and draft per token."""
    policy, seen, propose = tiny_policy(), [], drafting.ModelDrafter.propose
    monkeypatch.setattr(drafting, "PREFILL_TOKENS", most)

    def checked(self, request):
        found = propose(self, request)
        numbers = (request.count, request.trajectory, request.position, request.temperature)
        for prefix, draft, *row in zip(request.prefixes, found, *numbers, strict=True):
            want, (count, trajectory, position, temperature) = [], row
            while len(want) < count:
                ids = torch.tensor(prefix + want)
                end = torch.full((len(ids),), len(ids), dtype=torch.int32)
                hidden = self.model.tree_hidden(ids, torch.arange(len(ids)), end)[-1:]
                draw = self.drawer(
                    hidden, torch.tensor([0]), temperature[None], trajectory[None], position[None] + len(want)
                )
                if int(draw.token) == 0:
                    break
                want.append(int(draw.token))
            assert draft == want
            seen.append(len(want))
        return found

    monkeypatch.setattr(drafting.ModelDrafter, "propose", checked)
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=6, seed=2)
    for model in (with_adapter(policy, 0.3).reference, tiny_policy(family="gpt2")):
        for extra in ({}, SETTINGS["tool"], dict(batch_size=3, merge=False)):
            sample([*PROMPTS, [1, 2, 4, 4, 4, 4]], drafts=Drafts(ModelDrafts(model), 3), **options, **extra)
    assert sum(seen) > 300


def test_a_draft_model_computes_every_token_once_in_bounded_memory(tiny_policy, monkeypatch, drafters):
    policy, model, hidden = tiny_policy(), tiny_policy(family="gpt2"), Policy.hidden
    tokens, prompts = {policy: 0, model: 0}, []

    def counted(self, ids, position, attention):
        tokens[self] += len(ids)
        if self is model and isinstance(attention, TreeAttention):
            prompts.append(len(ids))
        return hidden(self, ids, position, attention)

    monkeypatch.setattr(Policy, "hidden", counted)
    drafts = Drafts(ModelDrafts(model), 3)
    constraints = Constraints(0, 2, 20)
    options = dict(policy=policy, constraints=constraints, num_samples=40, batch_size=4, drafts=drafts)
    rollouts = sample(PROMPTS, **options)
    # what the policy computes, but for the last token of each draft and those that were not followed
    assert 0 < tokens[model] < tokens[policy]
    assert rollouts.num_tokens > 500 and prompts == [3, 2, 5]
    (drafter,) = drafters
    assert drafter.pool.num_taken == 0
    capacity = 3 + 2 + 5 + 4 * (20 + 2 * 3)
    assert drafter.kv.capacity == capacity
    have = sum(x.numel() * x.element_size() for pair in drafter.kv.layers.values() for x in pair)
    assert have == capacity * ModelDrafts(model).node_bytes


def test_keys_and_values_of_a_draft_model_count_before_the_first_token(tiny_policy, monkeypatch, seen_tokens):
    policy = tiny_policy()
    options = dict(policy=policy, constraints=Constraints(0, max_length=6), num_samples=9, batch_size=9)
    node, capacity = policy.node_bytes, 3 + 2 + 5 + 9 * (6 + 2 * 4)
    monkeypatch.setattr(Policy, "free_bytes", lambda self: capacity * node)
    sample(PROMPTS, drafts=Drafts(PromptLookup()), **options)
    drafts = Drafts(ModelDrafts(policy.reference))
    del seen_tokens[:]
    with pytest.raises(InputError, match="batch_size must be so small that its keys and values fit"):
        sample(PROMPTS, drafts=drafts, **options)
    assert not seen_tokens
    monkeypatch.setattr(Policy, "free_bytes", lambda self: capacity * (node + drafts.source.node_bytes))
    sample(PROMPTS, drafts=drafts, **options)


def test_drafts_longer_than_sequences_take_no_memory_for_it(tiny_policy, monkeypatch, drafters):
    policy = tiny_policy()
    source = ModelDrafts(policy.reference)
    options = dict(policy=policy, constraints=Constraints(0, max_length=6), num_samples=9, batch_size=9)
    capacity = 3 + 2 + 5 + 9 * (6 + 2 * 5)
    num_bytes = capacity * (policy.node_bytes + source.node_bytes)
    monkeypatch.setattr(Policy, "free_bytes", lambda self: num_bytes)
    want = sample(PROMPTS, **options)
    assert_same(sample(PROMPTS, drafts=Drafts(source, 10**6), **options), want)
    assert drafters[0].kv.capacity == capacity


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_draft_model_that_runs_out_of_memory_starts_again(tiny_policy, monkeypatch, drafters, fails_at):
    policy, model, hidden = tiny_policy(), tiny_policy(family="gpt2"), Policy.hidden
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5, seed=6)
    want, passes = sample(PROMPTS, **options), []

    def fails_once(self, *args):
        if self is model:
            passes.append(1)
            if len(passes) == fails_at:
                raise torch.OutOfMemoryError("no room")
        return hidden(self, *args)

    monkeypatch.setattr(Policy, "hidden", fails_once)
    drafts = Drafts(ModelDrafts(model), 3)
    with pytest.warns(UserWarning, match="out of memory, going on with batch_size=7"):
        assert_same(sample(PROMPTS, drafts=drafts, **options), want)
    assert len(drafters) == 2 and drafters[0].kv is not drafters[1].kv
    assert_same(sample(PROMPTS, drafts=drafts, **options), want)


def test_weights_that_changed_between_calls_are_the_ones_that_draft(tiny_policy):
    """Stale keys and values of the policy's own draft would be refused."""
    policy = tiny_policy()
    drafts = Drafts(ModelDrafts(policy), 3)
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5, seed=6)
    first = rows(sample(PROMPTS, drafts=drafts, **options))
    with_adapter(policy, -1.0)
    want = sample(PROMPTS, **options)
    assert rows(want) != first
    assert_same(sample(PROMPTS, drafts=drafts, **options), want)
    assert drafts.acceptance == 1.0


def test_the_reference_drafts_from_the_base_whatever_is_merged(tiny_policy):
    policy, seen = tiny_policy(), {}
    before = [(n, p.requires_grad) for n, p in policy.model.named_parameters()]
    ids = torch.tensor([1, 2, 3, 4])
    tree = ids, torch.arange(4), torch.full((4,), 4, dtype=torch.int32)
    want = policy.reference.tree_hidden(*tree)
    with torch.no_grad(), policy.merged():
        torch.testing.assert_close(policy.reference.tree_hidden(*tree), want, rtol=0, atol=1e-12)
        assert not torch.allclose(policy.tree_hidden(*tree), want, atol=0.1)
    for merge in (True, False):
        drafts = seen[merge] = Drafts(ModelDrafts(policy.reference), 3)
        options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=9, seed=6)
        sample(PROMPTS, drafts=drafts, merge=merge, **options)
    assert seen[True].offered == seen[False].offered and seen[True].accepted == seen[False].accepted
    assert seen[True].acceptance < 0.9
    assert [(n, p.requires_grad) for n, p in policy.model.named_parameters()] == before
    # an adapter that adds nothing leaves the base
    drafts = Drafts(ModelDrafts(with_adapter(policy, 0.0).reference), 3)
    sample(PROMPTS, drafts=drafts, **options)
    assert drafts.acceptance == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tiny: tiny(vocab=12), r"of the policy's vocabulary size \(13\), got 12; use"),
        (lambda tiny: tiny(positions=12), r"of a context of prompt \+ max_length = 13 tokens, got 12"),
        (
            lambda tiny: SimpleNamespace(vocab_size=13, device=torch.device("meta"), max_positions=None),
            r"on the policy's device \(cpu\), got meta; use",
        ),
    ],
    ids=["vocabulary", "context", "device"],
)
def test_a_draft_model_that_does_not_fit_is_refused(tiny_policy, seen_tokens, make, message):
    policy = tiny_policy()
    source = ModelDrafts(policy)
    source._policy = make(tiny_policy)
    source._policy.node_bytes = 1
    del seen_tokens[:]
    with pytest.raises(InputError, match=f"sample: draft model must be {message}"):
        sample(
            PROMPTS, policy=policy, constraints=Constraints(0, max_length=8), num_samples=2,
            drafts=Drafts(source),
        )  # fmt: skip
    assert not seen_tokens


@pytest.mark.parametrize("model", [None, "smollm2-135m", torch.nn.Linear(2, 2)])
def test_what_is_no_draft_model_is_refused(model):
    with pytest.raises(InputError, match="ModelDrafts: model must be a Policy or a Reference, got .*; pass"):
        ModelDrafts(model)


def test_a_policy_without_an_adapter_has_no_base_to_draft_from(tiny_policy):
    policy = tiny_policy()
    bare = Policy(policy.model.unload())
    bare.model.requires_grad_(True)
    with pytest.raises(InputError, match="Policy.reference: model must be a LoRA adapter or frozen weights"):
        ModelDrafts(bare.reference)
