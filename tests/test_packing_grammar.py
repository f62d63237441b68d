"""pack under a grammar: what it asks, what the tree keeps, what it refuses."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from grammar_cases import OTHER_STOP, SHORT, STOP, Stops, V, language, make, rollouts_of

from fastgfn import packing
from fastgfn.checks import InputError
from fastgfn.functional.tree import node_sequences
from fastgfn.packing import pack
from fastgfn.replay import ReplayBuffer
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints


@pytest.mark.parametrize("at_once", [1, 2, 256])
def test_the_grammar_is_asked_once_about_every_state(monkeypatch, at_once):
    """And the tree holds its distinct answers in packed bits, without stops below min_length."""
    monkeypatch.setattr(packing, "STATES", at_once)
    grammar, limits = make("everything")
    space = language(grammar, limits)
    grammar.calls.clear()
    tree = pack(rollouts_of(space + space[:3], [0] * len(space) + [1] * 3, limits), grammar=grammar)
    asked = tree.is_state & (tree.length < limits.max_length)
    nodes = asked.nonzero()[:, 0]
    want = sorted(map(tuple, node_sequences(tree, nodes)))
    assert sorted(z for call in grammar.calls for z in call) == want and len(want) > 12
    assert max(map(len, grammar.calls)) <= at_once
    assert all(max(map(len, a)) <= min(map(len, b)) for a, b in pairwise(grammar.calls))
    assert torch.equal(tree.allowed_row < 0, ~asked) and tree.allowed.shape == (3, 2)
    bits = np.unpackbits(tree.allowed.numpy(), axis=1, bitorder="little")[:, :V]
    masks = torch.from_numpy(bits).bool()[tree.allowed_row[nodes]]
    truth = grammar.allowed(node_sequences(tree, nodes))
    truth[:, [STOP, OTHER_STOP]] &= (tree.length[nodes] >= 1)[:, None]
    assert torch.equal(masks, truth)
    assert torch.equal(tree.to("cpu").allowed, tree.allowed) and tree.to("cpu").terminable.equal(
        tree.terminable
    )


@pytest.mark.parametrize("case", ["short", "min_length", "stops", "cut", "everything"])
def test_where_stopping_is_certain(case):
    """At max_length, and where the grammar leaves termination tokens alone: so says q."""
    grammar, limits = make(case)
    space = language(grammar, limits)
    tree = pack(rollouts_of(space, [0] * len(space), limits), grammar=grammar)
    left = {}
    for node in tree.is_state.nonzero()[:, 0].tolist():
        (z,) = node_sequences(tree, torch.tensor([node]))
        others = set(grammar.allowed([z])[0].nonzero()[:, 0].tolist()) - set(limits.termination_token_ids)
        left[node] = set() if len(z) == limits.max_length else others
    want = torch.tensor([not left.get(node, {0}) for node in range(tree.num_nodes)])
    assert torch.equal(tree.must_stop, want) and bool(want.any()) and not bool(want.all())
    if case in ("short", "stops"):
        assert bool((tree.length[want] < limits.max_length).any())


def test_replayed_sequences_are_packed_with_the_grammar_again():
    grammar, limits = make("short")
    rollouts = rollouts_of([[1, 2], [8], [4, 3]], [0, 0, 1], limits)
    buffer = ReplayBuffer(duplicates="exact")
    buffer.add(rollouts, torch.zeros(3))
    replayed = buffer.sample(rollouts, 2, np.random.default_rng(0))
    assert replayed.has_grammar and replayed.num_trajectories == 5
    tree = pack(replayed, grammar=grammar)
    both = pack(rollouts.extended(replayed), grammar=grammar)
    assert torch.equal(tree.allowed, both.allowed) and tree.num_nodes == both.num_nodes
    with pytest.raises(InputError, match="rollouts must be drawn without a grammar, got one"):
        pack(replayed)


class Answers:
    def __init__(self, answer):
        self.allowed = answer


ALL = torch.ones(1, V, dtype=torch.bool)
REFUSALS = {
    "token": (SHORT, [[1, 2], [1, 3]], {}, r"got one that forbids token 3 after \[1\]; pass sample's"),
    "last": (SHORT, [[1, 2], [1, 3]], dict(max_length=2), r"forbids token 3 after \[1\]"),
    "stop": (SHORT, [[1, 2], [1]], {}, r"forbids stopping after \[1\]"),
    "own": (
        SHORT,
        [[1, 2]],
        dict(termination="own"),
        "termination must be 'forced' under a grammar, got own",
    ),
    "list": (lambda zs: [[True]], [[1]], {}, "grammar mask must be a bool tensor, got list; return"),
    "float": (
        lambda zs: torch.ones(len(zs), V),
        [[1]],
        {},
        "grammar mask must be a bool tensor, got torch.fl",
    ),
    "rows": (lambda zs: ALL.repeat(2, 1), [[1]], {}, r"grammar mask must be \(1, V\), got \(2, 13\)"),
    "columns": (
        lambda zs: ALL[:, :5],
        [[1, 7]],
        {},
        "grammar mask must be 8 columns, got 5; return a column",
    ),
    "nothing": (lambda zs: ~ALL, [[1]], {}, r"got one that forbids every token after \[\]"),
    "too_short": (SHORT, [[1, 2]], dict(min_length=3), "at least constraints.min_length = 3 tokens long"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_pack_refuses(case):
    kind, sequences, options, message = REFUSALS[case]
    limits = Constraints(STOP, **({"max_length": 4} | options))
    grammar = Stops(kind) if isinstance(kind, tuple) else Answers(kind)
    rollouts = rollouts_of(sequences, [0] * len(sequences), limits, [[1, 2]])
    with pytest.raises(InputError, match=message):
        pack(rollouts, grammar=grammar)


def test_rollouts_and_grammar_go_together(tiny_policy):
    grammar, limits = make("short")
    options = dict(policy=tiny_policy(), constraints=limits, num_samples=2)
    free, bound = sample([[1]], **options), sample([[1]], grammar=grammar, **options)
    assert pack(free).allowed is None and pack(bound, grammar=grammar).allowed is not None
    for rollouts in (bound, free.extended(bound)):
        with pytest.raises(InputError, match="pack: rollouts must be drawn without a grammar, got one; pass"):
            pack(rollouts)
    with pytest.raises(
        InputError, match="pack: rollouts must be drawn under a grammar, got none; pass it to"
    ):
        pack(free, grammar=grammar)


def test_a_prompt_without_sequences_and_no_prompt_at_all(tiny_policy):
    grammar, limits = make("short")
    tree = pack(rollouts_of([[1, 2]], [1], limits), grammar=grammar)
    log_probs = score(tree, policy=tiny_policy())
    assert bool(log_probs.log_pf.isfinite().all()) and bool(log_probs.log_pterm.isfinite().all())
    assert pack(rollouts_of([], [], limits, []), grammar=grammar).num_nodes == 0
