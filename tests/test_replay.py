import json
import math

import numpy as np
import pytest
import torch

from fastgfn.checks import InputError, MissingPackageError
from fastgfn.replay import ReplayBuffer
from fastgfn.types import Constraints, Rollouts

PROMPT = [1, 2]


def _rollouts(sequences, prompts=(PROMPT,), group=None):
    width = max([1, *map(len, sequences)])
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    return Rollouts(
        tuple(torch.tensor(p) for p in prompts),
        torch.tensor(group if group is not None else [0] * len(sequences)),
        tokens,
        torch.tensor([len(s) for s in sequences]),
        torch.zeros(len(sequences)),
        Constraints(0, max_length=width),
    )


def _add(buffer, sequences, rewards, **kw):
    return buffer.add(_rollouts(sequences, **kw), torch.tensor(rewards))


def _stored(buffer):
    return {e.tokens: e.log_reward for e in buffer.entries(PROMPT)}


def test_exact_duplicates_are_rejected_and_the_worst_is_evicted():
    buffer = ReplayBuffer(3, duplicates="exact")
    assert _add(buffer, [[1], [2], [1], []], [-1.0, -2.0, -1.0, -5.0]) == 3
    assert _add(buffer, [[3], [4]], [-9.0, -0.5]) == 1
    assert _stored(buffer) == {(1,): -1.0, (2,): -2.0, (4,): -0.5}


def test_near_duplicates_keep_the_better_one():
    buffer = ReplayBuffer(10, duplicates="near", tolerance=0.25)
    a, b, far = [1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9, 7]
    assert _add(buffer, [a, b, far], [-2.0, -3.0, -4.0]) == 2
    assert _stored(buffer) == {tuple(a): -2.0, tuple(far): -4.0}
    assert _add(buffer, [b], [-1.0]) == 1
    assert _stored(buffer) == {tuple(b): -1.0, tuple(far): -4.0}
    # distance 1 is not below 0.25 * (1 + 1): ten and a hundred may both stay
    assert _add(buffer, [[1], [2]], [0.0, 0.0]) == 2


def test_a_newcomer_has_to_beat_every_near_duplicate():
    buffer = ReplayBuffer(10, tolerance=0.25)
    ends, middle = [[1, 1, 3, 4], [1, 2, 3, 9]], [1, 2, 3, 4]
    assert _add(buffer, ends, [-1.0, -3.0]) == 2
    assert _add(buffer, [middle], [-2.0]) == 0
    assert _add(buffer, [middle], [-0.5]) == 1
    assert _stored(buffer) == {tuple(middle): -0.5}


def test_prompts_have_buffers_of_their_own():
    buffer = ReplayBuffer(2, duplicates="exact")
    prompts = ([1], [2])
    _add(buffer, [[5], [5], [6]], [0.0, -1.0, -2.0], prompts=prompts, group=[0, 1, 1])
    got = buffer.sample(_rollouts([[9]], prompts=prompts), 5, np.random.default_rng(0))
    assert sorted(zip(got.group.tolist(), map(tuple, got.sequences()), strict=True)) == [
        (0, (5,)),
        (1, (5,)),
        (1, (6,)),
    ]
    assert bool(got.log_behavior.isnan().all())
    assert buffer.sample(_rollouts([[9]], prompts=([3],)), 5, np.random.default_rng(0)) is None


@pytest.mark.parametrize("priority", ["reward", "uniform"])
def test_draws_follow_the_priority(priority):
    buffer = ReplayBuffer(3, duplicates="exact", priority=priority)
    _add(buffer, [[1], [2], [3]], [math.log(0.6), math.log(0.3), math.log(0.1)])
    draws = [
        buffer.sample(_rollouts([[1]]), 1, np.random.default_rng([4, i])).sequences()[0][0]
        for i in range(3000)
    ]
    want = [0.6, 0.3, 0.1] if priority == "reward" else [1 / 3] * 3
    for token, p in zip((1, 2, 3), want, strict=True):
        assert abs(draws.count(token) / 3000 - p) < 4 * math.sqrt(p * (1 - p) / 3000)
    # without replacement: asking for everything returns everything once
    whole = buffer.sample(_rollouts([[1]]), 10, np.random.default_rng(0)).sequences()
    assert sorted(whole) == [[1], [2], [3]]


def test_the_state_survives_json_exactly():
    buffer = ReplayBuffer(5)
    _add(buffer, [[1, 2, 3], [4, 5, 6], []], [-0.1, -1 / 3, -7.25])
    copy = ReplayBuffer(5)
    copy.load_state(json.loads(json.dumps(buffer.state())))
    assert copy.entries(PROMPT) == buffer.entries(PROMPT) and len(copy) == 3
    for b in (buffer, copy):
        _add(b, [[1, 2, 3]], [0.0])
    assert copy.entries(PROMPT) == buffer.entries(PROMPT)


def test_refuses_bad_input(monkeypatch):
    with pytest.raises(InputError, match="capacity must be >= 1, got 0"):
        ReplayBuffer(0)
    with pytest.raises(InputError, match="duplicates must be 'near' or 'exact'"):
        ReplayBuffer(5, duplicates="fuzzy")
    buffer = ReplayBuffer(5)
    with pytest.raises(InputError, match=r"log_reward must be \(2,\), got \(3,\)"):
        buffer.add(_rollouts([[1], [2]]), torch.zeros(3))
    with pytest.raises(InputError, match="log_reward must be finite"):
        buffer.add(_rollouts([[1], [2]]), torch.tensor([0.0, math.nan]))
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(
        MissingPackageError, match=r"rapidfuzz must be installed.*pip install 'fastgfn\[replay\]'"
    ):
        ReplayBuffer(5)
