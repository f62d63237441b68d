"""Grammars of other packages: masks against an automaton, sampled texts, log-probs, the cache, refusals."""

import json
import re
import sys

import pytest
import torch
from automaton import Automaton, digits

from fastgfn.checks import InputError, MissingPackageError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.integrations.grammars import LLGuidanceGrammar, PrefixGrammar, XGrammar
from fastgfn.models import bundled_model_folder, load_policy
from fastgfn.rewards import SequenceReward
from fastgfn.rollout import sample
from fastgfn.train import Trainer
from fastgfn.types import Constraints

V = 49152
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_folder())


@pytest.fixture(scope="module")
def texts(tokenizer):
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [None if i in special else tokenizer.decode([i]) for i in range(V)]


@pytest.fixture(params=[LLGuidanceGrammar, XGrammar], ids=["llguidance", "xgrammar"])
def make(request, tokenizer):
    """Factory of a grammar of each package."""
    pytest.importorskip(request.node.callspec.id.split("-")[0])

    def build(kind, definition, stop, **options):
        options = dict(tokenizer=tokenizer, vocab_size=V) | options
        return request.param(kind, definition, termination_token_id=stop, **options)

    return build


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


STOPS = {"eos": "<|im_end|>", "text": ".", "digit": "7"}


@pytest.mark.parametrize("stop", STOPS)
def test_masks_are_those_of_the_automaton(make, tokenizer, texts, stop):
    """Also with a termination token that is text: then it is no part of Z and never allowed as text."""
    (stop,) = ids(tokenizer, STOPS[stop])
    grammar, truth = make("regex", "[0-9]{1,3}", stop), digits(1, 3, texts, stop)
    prefixes = [[], ids(tokenizer, "4"), ids(tokenizer, "42"), ids(tokenizer, "421"), [], ids(tokenizer, "4")]
    want = truth.allowed(prefixes)
    for _ in range(2):
        got = grammar.allowed(prefixes)
        assert got.shape == (6, V) and got.dtype == torch.bool and torch.equal(got, want)
    ten = 10 - (STOPS["digit"] == texts[stop])
    assert want.sum(1).tolist() == [ten, ten + 1, ten + 1, 1, ten, ten + 1]
    assert grammar.allowed([]).shape == (0, V)


WORDS = {0: {"y": 1, "n": 4}, 1: {"e": 2}, 2: {"s": 3}, 3: {" ": 0}, 4: {"o": 3}}


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("regex", "(yes|no)( (yes|no))*"),
        ("lark", 'start: word (" " word)*\nword: "yes" | "no"'),
        ("ebnf", 'root ::= word (" " word)*\nword ::= "yes" | "no"'),
    ],
    ids=["regex", "lark", "ebnf"],
)
def test_each_kind_gives_the_same_masks(make, tokenizer, texts, kind, definition):
    """Tokens of several characters, and every spelling of a text."""
    truth = Automaton(WORDS, {3}, texts, 2)
    prefixes = [[]]
    for text in ("yes no", "no no yes"):
        for spelling in (ids(tokenizer, text), [i for c in text for i in ids(tokenizer, c)]):
            prefixes += [spelling[:k] for k in range(1, len(spelling) + 1)]
    want = truth.allowed(prefixes)
    assert torch.equal(make(kind, definition, 2).allowed(prefixes), want) and int(want.sum()) > 60


def test_special_tokens_are_no_text(make, tokenizer, texts):
    grammar = make("regex", "(.|\n)*", 2)
    allowed = grammar.allowed([[], ids(tokenizer, "any thing")])
    special = torch.tensor([t is None for t in texts])
    special[2] = False
    assert not allowed[:, special].any() and bool(allowed[:, 2].all()) and int(allowed.sum()) > 90_000
    with pytest.raises(InputError, match=r"sequence must be accepted by the grammar, got token 1 after \[\]"):
        grammar.allowed([[1]])


@pytest.mark.parametrize("size", [V + 37, 49_000])
def test_the_model_may_have_more_or_fewer_ids_than_its_tokenizer(make, size):
    want = make("regex", "(.|\n)*", 2).allowed([[]])
    got = make("regex", "(.|\n)*", 2, vocab_size=size).allowed([[]])
    assert got.shape == (1, size) and torch.equal(got[:, :V], want[:, :size]) and not got[:, V:].any()


def test_a_text_is_accepted_in_every_spelling_and_stops_there(make, tokenizer):
    grammar = make("json_schema", SCHEMA, 2)
    whole = ids(tokenizer, '{"ok": true, "n": 42}')
    allowed = grammar.allowed([whole[:k] for k in range(len(whole) + 1)])
    assert allowed[:-1, 2].tolist() == [False] * len(whole) and bool(allowed[-1, 2])
    assert all(bool(allowed[k, token]) for k, token in enumerate(whole))
    assert torch.equal(make("json_schema", json.dumps(SCHEMA), 2).allowed([whole[:3]])[0], allowed[3])


@pytest.mark.parametrize("settings", [{}, dict(batch_size=3, capacity=1)], ids=str)
def test_sampled_numbers_are_accepted_and_log_probs_renormalised(
    make, tiny_policy, tokenizer, texts, settings
):
    policy, truth = tiny_policy(vocab=V), digits(1, 3, texts, 2)
    capacity = {k: settings[k] for k in settings if k == "capacity"}
    batch = {k: settings[k] for k in settings if k != "capacity"}
    prompts = [ids(tokenizer, "A number:"), ids(tokenizer, "Another one:")]
    rollouts = sample(
        prompts, policy=policy, constraints=Constraints(2, max_length=6), num_samples=12,
        grammar=make("regex", "[0-9]{1,3}", 2, **capacity), **batch,
    )  # fmt: skip
    lengths = set()
    for n, z in enumerate(rollouts.sequences()):
        assert re.fullmatch("[0-9]{1,3}", tokenizer.decode(z)) and bool(rollouts.terminated[n])
        lengths.add(len(z))
        text = torch.tensor(prompts[int(rollouts.group[n])] + z)
        with policy.plain() as model, torch.no_grad():
            logits = model(text[None], use_cache=False).logits[0, -len(z) - 1 :].double()
        masked = logits.masked_fill(~truth.allowed([z[:k] for k in range(len(z) + 1)]), -torch.inf)
        want = masked.log_softmax(-1)
        own = want[torch.arange(len(z)), z]
        torch.testing.assert_close(rollouts.log_pf[n, : len(z)].double(), own, rtol=0, atol=1e-5)
        got = rollouts.log_pterm[n, : len(z) + 1].double()
        torch.testing.assert_close(got, want[:, 2], rtol=0, atol=1e-5)
        density = float(own.sum() + want[-1, 2])
        assert float(rollouts.log_behavior[n]) == pytest.approx(density, abs=1e-5)
    assert len(lengths) > 1


def test_training_reaches_the_posterior_on_the_language(make, tiny_policy, texts):
    """Its truth comes from the automaton; the two packages allow every spelling."""
    policy, limits = tiny_policy(vocab=V, dtype=torch.float32, rank=8), Constraints(2, max_length=2)
    edges = {0: dict.fromkeys("0123456789", 1), 1: {"x": 2}, 2: {}}
    grammar, truth = make("regex", "[0-9]x?", 2), Automaton(edges, {1, 2}, texts, 2)
    reward = SequenceReward(lambda zs: [-0.2 * sum(t % 7 for t in z) for z in zs])
    space = [[int(t)] for t in truth.row(0).nonzero()[:, 0]]
    space += [[*z, int(t)] for z in space for t in truth.row(1).nonzero()[:, 0] if t != 2]
    target = torch.tensor(reward.function(space), dtype=torch.float64).log_softmax(0)
    trainer = Trainer(
        policy, prompts=[[1, 5]], reward=reward, constraints=limits, grammar=grammar,
        config=TrainConfig(num_samples=32, replay_samples=0, learning_rate=3e-2, steps=40),
    )  # fmt: skip
    distances = []
    for _ in range(2):
        log_q, _ = sequence_log_probs([1, 5], space, policy=policy, constraints=limits, grammar=grammar)
        assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-5)
        distances.append(divergence(log_q, target, 0.0).tv)
        drifts = [trainer.step()["drift"] for _ in range(40)]
    assert max(drifts) < 1e-5 and distances[0] > 0.2 and distances[1] < 0.05


@pytest.mark.slow
def test_smollm2_writes_what_the_schema_says(make):
    policy = load_policy("smollm2-135m", lora_rank=4)
    grammar = make("json_schema", SCHEMA, 2, tokenizer=policy.tokenizer, vocab_size=policy.vocab_size)
    prompt = policy.encode('As JSON, e.g. {"ok": true, "n": 7}: ')
    rollouts = sample(
        [prompt], policy=policy, constraints=Constraints(2, max_length=40), num_samples=8,
        grammar=grammar, seed=1,
    )  # fmt: skip
    assert int(rollouts.terminated.sum()) >= 4
    for n, z in enumerate(rollouts.sequences()):
        assert bool(grammar.allowed([z])[0, 2]) == bool(rollouts.terminated[n])
        if rollouts.terminated[n]:
            found = json.loads(policy.decode(z))
            assert set(found) == {"ok", "n"} and type(found["ok"]) is bool and 0 <= found["n"] <= 99


class Counted(PrefixGrammar):
    """Over an automaton; it counts copies and steps."""

    def __init__(self, automaton, capacity):
        super().__init__([], len(automaton.texts), automaton.stop, capacity)
        self.automaton, self.copies, self.steps = automaton, 0, 0

    def _copy(self, matcher):
        self.copies += 1
        return list(matcher)

    def _advance(self, matcher, token):
        self.steps += 1
        matcher.append(token)
        return None if self.automaton.state(matcher) is not None else "the automaton ends"

    def _accepts(self, matcher):
        return self.automaton.state(matcher) in self.automaton.accepting

    def _masks(self, matchers):
        return self.automaton.allowed(matchers).to(torch.uint8).numpy()


CHARACTERS = ["", *"0123456789", "x"]


def growing(generator, rows=9, length=6):
    """The prefixes of each step of a batch whose rows share their first tokens."""
    whole = torch.randint(1, 4, (rows, length), generator=generator).tolist()
    return [[z[:k] for z in whole] for k in range(length + 1)]


def test_each_new_prefix_costs_one_copy_and_one_token():
    automaton = digits(2, 9, CHARACTERS, 0)
    grammar, steps = Counted(automaton, 100), growing(torch.Generator().manual_seed(0))
    for prefixes in steps:
        assert torch.equal(grammar.allowed(prefixes), automaton.allowed(prefixes))
    distinct = len({tuple(z) for prefixes in steps for z in prefixes} - {()})
    assert grammar.copies == grammar.steps == distinct < 9 * 6
    for prefixes in reversed(steps):
        assert torch.equal(grammar.allowed(prefixes), automaton.allowed(prefixes))
    assert grammar.copies == distinct
    grammar.allowed([[*steps[3][0], 4, 4, 4]])
    assert (grammar.copies, grammar.steps) == (distinct + 1, distinct + 3)


@pytest.mark.parametrize("capacity", [1, 4])
def test_a_full_cache_forgets_the_oldest_and_changes_nothing(capacity):
    automaton = digits(2, 9, CHARACTERS, 0)
    grammar, steps = Counted(automaton, capacity), growing(torch.Generator().manual_seed(1))
    for prefixes in steps:
        assert torch.equal(grammar.allowed(prefixes), automaton.allowed(prefixes))
        assert len(grammar._known) <= capacity
    assert list(grammar._known) == list(dict.fromkeys(map(tuple, steps[-1])))[-capacity:]
    before = grammar.steps
    grammar.allowed([steps[-1][-1] + [1]])
    assert grammar.steps == before + 1


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([1, 11, 2], r"got token 11 after \[1\] \(the automaton ends\); pass prefixes and tool output that"),
        ([1, 0], r"got token 0 after \[1\] \(it is the termination token\)"),
        ([12], r"got token 12 after \[\] \(no id in \[0, 12\)\)"),
        ([-1], r"got token -1 after \[\] \(no id in"),
    ],
)
def test_a_sequence_that_the_grammar_does_not_accept_is_refused(sequence, message):
    grammar = Counted(digits(2, 9, CHARACTERS, 0), 100)
    grammar.allowed([[1], [1, 2]])
    with pytest.raises(InputError, match="Counted: sequence must be accepted by the grammar, " + message):
        grammar.allowed([[2], sequence])
    assert torch.equal(grammar.allowed([[1]]), grammar.automaton.allowed([[1]]))


def test_the_packages_refuse_sequences(make, tokenizer):
    grammar = make("regex", "[0-9]{1,3}", 2)
    for z in (ids(tokenizer, "12x"), ids(tokenizer, "1234"), [*ids(tokenizer, "12"), 2]):
        with pytest.raises(InputError, match="sequence must be accepted by the grammar, got token"):
            grammar.allowed([ids(tokenizer, "1"), z])
    assert int(grammar.allowed([ids(tokenizer, "12")]).sum()) == 11


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("regex", "[0-"),
        ("lark", "start: nothing"),
        ("ebnf", "root ::= missing"),
        ("json_schema", {"type": "wat"}),
        ("json_schema", "{"),
    ],
)
def test_the_packages_refuse_grammars(make, kind, definition):
    message = rf"Grammar: definition must be a {kind} that \w+ takes, got .+ \(.{{9}}"
    with pytest.raises(InputError, match=message):
        make(kind, definition, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="yaml"), "kind must be one of regex, json_schema, lark, ebnf, got 'yaml'"),
        (dict(tokenizer=None), "tokenizer must be a fast tokenizer of transformers, got NoneType"),
        (dict(stop=V), rf"termination_token_id must be in \[0, {V}\), got {V}"),
        (dict(vocab_size=0), "vocab_size must be >= 1, got 0"),
        (dict(capacity=0), "capacity must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**(dict(kind="regex", definition="a", stop=2) | options))


@pytest.mark.parametrize(("made", "package"), [(LLGuidanceGrammar, "llguidance"), (XGrammar, "xgrammar")])
def test_a_missing_package_is_named(monkeypatch, made, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package} must be installed, got none; run `pip install 'fastgfn\[grammar\]'`"
    with pytest.raises(MissingPackageError, match=message):
        made("regex", "a", tokenizer=None, termination_token_id=0)


def test_a_grammar_that_needs_the_termination_token_as_text_is_refused(make, tiny_policy, tokenizer):
    (stop,) = ids(tokenizer, ".")
    with pytest.raises(InputError, match="grammar mask must be True somewhere in every row, got none"):
        sample(
            [[1]], policy=tiny_policy(vocab=V), constraints=Constraints(stop), num_samples=2,
            grammar=make("regex", "a\\.b", stop),
        )  # fmt: skip
