"""What a buffer keeps, against the definition spelled out over plain lists."""

import json
import math
import random

import numpy as np
import pytest
import torch
from replay_cases import PROMPT, add, rollouts_of

from fastgfn.checks import InputError, InputTypeError
from fastgfn.replay import Entry, ReplayBuffer, Submodular
from fastgfn.replay.neighbors import CosineNeighbors, EditNeighbors


def _edits(a, b):
    """Token edit distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _embed(sequences):
    """Counts of the tokens, and one more so that the empty sequence has a direction."""
    return torch.tensor([[1.0] + [float(z.count(t)) for t in range(5)] for z in sequences])


def _cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(*_embed([list(a), list(b)]).double(), dim=0))


class Plain:
    """The definition: lists, sorted anew each time; no heap, no table."""

    def __init__(self, capacity, duplicates, tolerance, max_age):
        self.capacity, self.duplicates, self.tolerance, self.max_age = (
            capacity,
            duplicates,
            tolerance,
            max_age,
        )
        self.rows, self.given = [], 0
        self.temperatures = (1.0, 1.0)

    def value(self, row):
        factors, tokens = row[:2]
        return factors[0] + factors[1] * (self.temperatures[0] / self.temperatures[1]), tokens

    def near(self, a, b):
        if self.duplicates == "near":
            return _edits(a, b) < self.tolerance * (len(a) + len(b))
        return self.duplicates == "embedding" and 1 - _cosine(a, b) < self.tolerance

    def add(self, tokens, factors, version, density):
        new = (factors, tokens, version, density, self.given)
        self.given += 1
        if self.max_age is not None:
            self.rows = [r for r in self.rows if version - r[2] <= self.max_age]
        for i, row in enumerate(self.rows):
            if row[1] == tokens:
                self.rows[i] = (row[0], *new[1:])
                return
        ordered = sorted(self.rows, key=self.value)
        if len(ordered) == self.capacity and self.value(new) < self.value(ordered[0]):
            return
        near = [r for r in ordered if self.near(r[1], tokens)]
        if any(self.value(r) > self.value(new) for r in near):
            return
        ordered = [r for r in ordered if r not in near]
        self.rows = ordered[len(ordered) == self.capacity :] + [new]


@pytest.mark.parametrize("duplicates", ["exact", "near", "embedding"])
@pytest.mark.parametrize("seed", range(8))
def test_the_kept_set_is_that_of_the_definition(duplicates, seed):
    """Under ties, changes of temperature, expiry, snapshots, and a state that is saved and loaded."""
    rng = random.Random(seed)
    capacity, max_age = rng.choice([1, 3, 8]), rng.choice([None, 2])
    tolerance = {"near": 0.25, "exact": 0.0, "embedding": 0.1}[duplicates]
    options = dict(
        duplicates=duplicates, tolerance=tolerance, max_age=max_age, factors=("a", "b"), embed=_embed
    )
    buffer, plain = ReplayBuffer(capacity, **options), Plain(capacity, duplicates, tolerance, max_age)
    evicted = 0
    for version in range(12):
        if version % 4 == 3:
            plain.temperatures = (rng.choice([0.5, 1.0]), rng.choice([0.25, 2.0]))
            buffer.retemper(plain.temperatures)
        if version % 5 == 4:
            state = json.loads(json.dumps(buffer.state()))
            buffer = ReplayBuffer(capacity, **options)
            buffer.load_state(state)
            assert buffer.state() == state
        before, want_before = buffer.snapshot(), buffer.state()
        zs = [[rng.randrange(5) for _ in range(rng.randrange(7))] for _ in range(9)]
        # few distinct values, so that ties are many; the first one of a stored sequence stays
        factors = [[-float((sum(z) + version) % 3), -float(len(z) % 3)] for z in zs]
        density = [-rng.random() for _ in zs]
        add(buffer, zs, factors, version=version, log_behavior=density)
        if version % 3 == 2:  # undone and done again
            buffer.restore(before)
            assert buffer.state() == want_before
            add(buffer, zs, factors, version=version, log_behavior=density)
        for z, f, d in zip(zs, factors, density, strict=True):
            full = len(plain.rows) == capacity
            plain.add(tuple(z), tuple(f), version, float(np.float32(d)))
            evicted += full
        want = sorted(plain.rows, key=plain.value)
        got = [(e.factors, e.tokens, e.version, e.log_behavior, e.order) for e in buffer.entries(PROMPT)]
        assert got == want
    assert evicted > 10


def test_the_best_of_all_distinct_sequences_are_kept_in_any_order():
    rng = random.Random(1)
    values = {(i, rng.randrange(4)): rng.gauss(0, 1) for i in range(200)}
    want = sorted(values.items(), key=lambda item: (item[1], item[0]))[-20:]
    for _ in range(3):
        buffer, order = ReplayBuffer(20, duplicates="exact"), list(values) * 2
        rng.shuffle(order)
        for i in range(0, 400, 16):
            some = order[i : i + 16]
            add(buffer, some, [values[z] for z in some])
        assert [(e.tokens, e.log_reward) for e in buffer.entries(PROMPT)] == want


def test_entries_leave_in_sorted_order():
    rng = random.Random(2)
    rewards = [float(rng.randrange(10)) for _ in range(30)]
    buffer = ReplayBuffer(30, duplicates="exact")
    add(buffer, [[i] for i in range(30)], rewards)
    left = [(e.log_reward, e.tokens) for e in buffer.entries(PROMPT)]
    assert left == sorted((r, (i,)) for i, r in enumerate(rewards))
    for n in range(30):
        add(buffer, [[100 + n]], [100.0])
        assert [(e.log_reward, e.tokens) for e in buffer.entries(PROMPT)][: 29 - n] == left[n + 1 :]


def test_the_heap_stays_within_twice_the_entries():
    """Near-duplicates that are replaced leave values behind; they are cleared away."""
    buffer = ReplayBuffer(8, tolerance=0.25)
    for step in range(500):
        add(buffer, [[step % 3 + 10 * k for k in range(6)]], [float(step)])
    (shelf,) = buffer._shelves.values()
    assert len(shelf) == 3 and len(shelf._heap) <= 2 * len(shelf) + 8


def test_the_worst_is_that_of_the_values_that_are_stored():
    """A replaced sequence may come back with a better value; its old one does not count."""
    buffer = ReplayBuffer(2, tolerance=0.25)
    a, b, c, d = [1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9, 9], [7, 7, 7, 7]
    for z, value in ((a, -5.0), (b, -4.0), (a, -3.0), (c, -3.5), (d, -3.4)):
        assert add(buffer, [z], [value]) == 1
    assert [list(e.tokens) for e in buffer.entries(PROMPT)] == [d, a]


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.25, 1.0])
def test_edit_neighbors_are_those_of_the_textbook(tolerance):
    rng = random.Random(3)
    alphabet = [0, 1, 7, 0xD800, 0xDFFF, 0x10FFFF]
    keys = {tuple(rng.choices(alphabet, k=rng.randrange(9))) for _ in range(80)}
    table = EditNeighbors(tolerance)
    for key in sorted(keys):
        table.add((key, ()))
    for key in sorted(keys)[::3]:
        table.remove((key, ()))
    left = sorted(keys - set(sorted(keys)[::3]))
    found = 0
    for key in sorted(keys):
        want = [k for k in left if _edits(k, key) < tolerance * (len(k) + len(key))]
        assert sorted(k for k, _ in table.near((key, ()))) == want
        found += len(want)
    assert found > 0 or tolerance == 0.0


def test_cosine_neighbors_are_those_of_the_definition():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(40, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = CosineNeighbors(0.3)
    for i, row in enumerate(rows):
        table.add(((i,), ()), row)
    for i in range(0, 40, 4):
        table.remove(((i,), ()))
    for i, row in enumerate(rows):
        want = [j for j in range(40) if j % 4 and 1 - float((rows[j] * row).sum()) < 0.3]
        assert sorted(j for (j,), _ in table.near(((i,), ()), row)) == want and (len(want) > 1 or i % 4 == 0)


def test_an_equal_sequence_makes_the_stored_one_new():
    buffer = ReplayBuffer(4, duplicates="exact", max_age=3)
    assert add(buffer, [[5], [6]], [-1.0, -2.0], version=0, log_behavior=[-3.0, -4.0]) == 2
    assert add(buffer, [[5]], [-1.0], version=3, log_behavior=[math.nan]) == 0
    assert buffer.entries(PROMPT) == [
        Entry((6,), (-2.0,), (), 0, -4.0, 1),
        Entry((5,), (-1.0,), (), 3, None, 2),
    ]
    drawn = buffer.sample(rollouts_of([[9]]), 4, np.random.default_rng(0), version=3)
    assert drawn.sequences() == [[5], [6]] or drawn.sequences() == [[6], [5]]
    assert sorted(drawn.log_behavior.nan_to_num(7.0).tolist()) == [-4.0, 7.0]
    # version 0 is too old for a policy of version 4, and gone
    drawn = buffer.sample(rollouts_of([[9]]), 4, np.random.default_rng(0), version=4)
    assert drawn.sequences() == [[5]] and len(buffer) == 1
    assert buffer.sample(rollouts_of([[9]]), 4, np.random.default_rng(0), version=7) is None
    assert len(buffer) == 0 and add(buffer, [[6]], [-2.0], version=7) == 1


def test_temperatures_apply_again_to_what_is_stored():
    """The order of eviction and the draws follow the current temperatures; the factors stay as they came."""
    buffer = ReplayBuffer(3, duplicates="exact", factors=("likelihood", "preference"))
    factors = {(1,): (-1.0, -5.0), (2,): (-2.0, -2.0), (3,): (-9.0, -0.5)}
    add(buffer, list(factors), list(factors.values()))
    assert [e.tokens for e in buffer.entries(PROMPT)] == [(3,), (1,), (2,)]
    buffer.retemper([4.0, 0.5])
    assert [e.tokens for e in buffer.entries(PROMPT)] == [(1,), (2,), (3,)]
    add(buffer, [[4]], [[-1.0, -3.0]])
    assert [e.tokens for e in buffer.entries(PROMPT)] == [(4,), (2,), (3,)]
    assert {e.tokens: e.factors for e in buffer.entries(PROMPT)} == {
        (2,): (-2.0, -2.0), (3,): (-9.0, -0.5), (4,): (-1.0, -3.0),
    }  # fmt: skip


def test_a_state_of_log_rewards_alone_still_loads():
    buffer = ReplayBuffer(3)
    buffer.load_state({"entries": {"1,2": [[-1.5, [5, 7]], [-0.5, [5, 7], [1]]], "3": [[-1 / 3, []]]}})
    assert buffer.entries(PROMPT) == [
        Entry((5, 7), (-1.5,), (), 0, None, 0),
        Entry((5, 7), (-0.5,), (1,), 0, None, 1),
    ]
    assert buffer.entries([3]) == [Entry((), (-1 / 3,), (), 0, None, 2)]
    add(buffer, [[8, 8, 8]], [0.0])
    assert [e.order for e in buffer.entries(PROMPT)] == [0, 1, 3]
    assert bool(
        buffer.sample(rollouts_of([[9]], prompts=([3],)), 1, np.random.default_rng(0)).log_behavior.isnan()
    )
    # a smaller buffer takes the best
    small = ReplayBuffer(1)
    small.load_state(buffer.state())
    assert [e.tokens for e in small.entries(PROMPT)] == [(8, 8, 8)]


def test_a_state_of_other_factors_changes_nothing():
    one, two = ReplayBuffer(3), ReplayBuffer(3, factors=("a", "b"))
    add(one, [[5]], [-1.0])
    add(two, [[5]], [[-1.0, 0.0]])
    for buffer, other in ((one, two), (two, one)):
        before = buffer.state()
        with pytest.raises(InputError, match="factors must be"):
            buffer.load_state(other.state())
        with pytest.raises((InputError, ValueError, TypeError)):
            buffer.load_state(other.state() | {"factors": list(buffer.factors), "entries": {"x": [[1]]}})
        assert buffer.state() == before
    with pytest.raises(InputError, match="factors must be"):
        two.load_state({"entries": {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "best"}, "priority must be 'reward', 'uniform', 'recency' or 'mix', got 'best'"),
        ({"selection": "best"}, "selection must be 'top', 'submodular' or 'length_balanced', got 'best'"),
        ({"keep": "best"}, "keep must be 'top' or 'submodular', got 'best'"),
        ({"tolerance": 1.5}, r"tolerance must be in \[0, 1\], got 1.5"),
        ({"half_life": -1.0}, "half_life must be finite and >= 0, got -1.0"),
        ({"recency_share": 2.0}, r"recency_share must be in \[0, 1\], got 2.0"),
        ({"length_bin": 0}, "length_bin must be >= 1, got 0"),
        ({"max_age": 0}, "max_age must be >= 1 or None, got 0"),
        ({"factors": ()}, "factors must be distinct names, one at least"),
        ({"factors": ("a", "a")}, "factors must be distinct names"),
        ({"duplicates": "embedding"}, "embed must be a callable with duplicates='embedding', got None"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        ReplayBuffer(5, **options)


def test_refuses_bad_values():
    buffer = ReplayBuffer(5, factors=("a", "b"))
    with pytest.raises(
        InputError, match=r"log_reward must be \(2, 2\), got \(2,\); one column for each of \('a', 'b'\)"
    ):
        add(buffer, [[1], [2]], [0.0, 0.0])
    with pytest.raises(InputError, match=r"finite, got -inf \(b\) for Z = \[2\]; clamp it"):
        add(buffer, [[1], [2]], [[0.0, 0.0], [0.0, -math.inf]])
    everywhere = r"finite, got -inf \(log_reward\) for Z = \[1\] and no finite value at all"
    with pytest.raises(InputError, match=everywhere):
        add(ReplayBuffer(5), [[1], [2]], [-math.inf] * 2)
    for bad in ([1.0], [1.0, 0.0], [1.0, math.inf]):
        with pytest.raises(InputError, match="temperatures must be 2 finite numbers > 0"):
            buffer.retemper(bad)
    with pytest.raises(InputError, match=r"every token id must be in \[0, 1114112\), got 1114112"):
        add(ReplayBuffer(5), [[1, 2], [1, 0x110000]], [0.0, 0.0])
    with pytest.raises(InputError, match="length must be finite and >= 0, got -1.0"):
        Submodular(length=-1.0)
    with pytest.raises(InputError, match="pool must be >= 1, got 0"):
        Submodular(pool=0)
    for kind, embed, message in (
        (InputError, lambda zs: torch.ones(1, 3), r"embed's result must be \(2, E\), got \(1, 3\)"),
        (InputError, lambda zs: torch.zeros(len(zs), 3), r"not zero, got a row of length 0.0 for Z = \[1\]"),
        (InputTypeError, lambda zs: [[1.0]] * len(zs), "a floating-point tensor, got list"),
        (InputTypeError, lambda zs: torch.ones(len(zs), 3).long(), "floating point, got torch.int64"),
    ):  # fmt: skip
        buffer = ReplayBuffer(5, duplicates="embedding", embed=embed)
        with pytest.raises(kind, match=message):
            add(buffer, [[1], [2]], [0.0, 0.0])
        assert len(buffer) == 0


def test_embeddings_of_another_width_are_refused():
    """One of width 1 would be taken for a row of equal numbers."""
    widths = iter((3, 1))
    buffer = ReplayBuffer(5, duplicates="embedding", embed=lambda zs: torch.ones(len(zs), next(widths)))
    buffer.add(rollouts_of([[5]]), torch.zeros(1))
    with pytest.raises(InputError, match="embed's width must be 3, got 1; return rows of one width"):
        buffer.add(rollouts_of([[6, 7, 8]]), torch.ones(1))
    assert len(buffer) == 1
