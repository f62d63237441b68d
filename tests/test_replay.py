import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastgfn.checks import InputError, MissingPackageError
from fastgfn.config import TrainConfig
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack
from fastgfn.replay import ReplayBuffer
from fastgfn.rewards import SequenceReward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.train import Trainer
from fastgfn.types import Constraints, Role, Rollouts

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
    with pytest.raises(InputError, match="duplicates must be 'near', 'exact' or 'embedding', got 'fuzzy'"):
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


def _with_tool(z):
    """The tool's answer to 5 is [7, 8], cut by max_length."""
    return [7, 8] if z[-1] == 5 else None


def test_tool_rollouts_come_back_with_what_the_tool_returned(tiny_policy):
    """Same sequences, same masks, same tree: the score of a replayed trajectory is that of the drawn one."""
    policy = tiny_policy()
    constraints = Constraints(0, max_length=6, logit_bias=torch.zeros(13).index_fill(0, torch.tensor(5), 3.0))
    drawn = sample(
        [PROMPT, [3]], policy=policy, constraints=constraints, num_samples=12, tool=lambda i, z: _with_tool(z)
    )
    assert int(drawn.action_mask().sum()) < int(drawn.lengths.sum())
    buffer = ReplayBuffer(50, duplicates="exact")
    added = buffer.add(drawn, torch.arange(24.0))
    buffer.load_state(json.loads(json.dumps(buffer.state())))
    assert buffer.add(drawn, torch.arange(24.0)) == 0
    replayed = buffer.sample(drawn, 50, np.random.default_rng(0))
    assert replayed.num_trajectories == added < 24

    def found(rollouts):
        log_probs = score(tree := pack(rollouts), policy=policy)
        log_q = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm)[tree.leaf].tolist()
        rows = zip(
            rollouts.group.tolist(), rollouts.sequences(), rollouts.action_mask().tolist(), strict=True
        )
        return {(g, *z, *(m[: len(z)])): q for (g, z, m), q in zip(rows, log_q, strict=True)}

    got, want = found(replayed), found(drawn)
    assert got.keys() == want.keys()
    assert got == {key: pytest.approx(value, abs=1e-9) for key, value in want.items()}
    both = pack(drawn.extended(replayed))
    assert both.num_nodes == pack(drawn).num_nodes and int((both.role == Role.OBSERVATION).sum()) > 0


@pytest.mark.parametrize("duplicates", ["near", "exact"])
def test_chosen_and_returned_tokens_are_different_trajectories(duplicates):
    buffer = ReplayBuffer(5, duplicates=duplicates, tolerance=0.0)
    rollouts = _rollouts([[5, 7], [5, 7], [5, 7]])
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    rollouts = dataclasses.replace(rollouts, is_action=mask)
    assert buffer.add(rollouts, torch.tensor([-1.0, -2.0, -3.0])) == 2
    assert [(e.log_reward, e.observed) for e in buffer.entries(PROMPT)] == [(-2.0, ()), (-1.0, (1,))]
    got = buffer.sample(rollouts, 5, np.random.default_rng(0))
    assert got.action_mask().tolist() == [[True, True], [True, False]]
    # without tool output nothing is said of it
    plain = ReplayBuffer(5, duplicates="exact")
    _add(plain, [[5, 7]], [-1.0])
    assert plain.sample(rollouts, 5, np.random.default_rng(0)).is_action is None
    assert plain.state()["entries"] == {"1,2": [[[-1.0], [5, 7], 0, 0.0, 0]]}


def test_a_trainer_of_tool_rollouts_replays_them(tiny_policy, monkeypatch):
    """Its trees have observations, which are no actions: no gradient, no drift, no part in log q."""
    trees = []

    def drawn(*args, **options):
        return sample(*args, tool=lambda i, z: _with_tool(z), **options)

    def packed(rollouts, **options):
        trees.append((rollouts, pack(rollouts, **options)))
        return trees[-1][1]

    monkeypatch.setattr("fastgfn.behavior.sampler.sample", drawn)
    monkeypatch.setattr("fastgfn.train.pack", packed)
    policy = tiny_policy(dtype=torch.float32)
    bias = torch.zeros(13).index_fill(0, torch.tensor(5), 3.0)
    config = TrainConfig(
        num_samples=6, replay_samples=4, replay_duplicates="exact", tempered_share=(0.0, 0.0)
    )
    reward = SequenceReward(lambda zs: [-0.5 * len(z) for z in zs])
    trainer = Trainer(
        policy, prompts=[PROMPT], reward=reward, constraints=Constraints(0, max_length=6, logit_bias=bias),
        config=config,
    )  # fmt: skip
    for _ in range(3):
        assert trainer.step()["drift"] < 1e-5
    for step, (rollouts, tree) in enumerate(trees):
        assert rollouts.num_trajectories == 6 + 4 * (step > 0)
        seen = tree.role == Role.OBSERVATION
        assert bool(seen.any()) and bool((score(tree, policy=policy).log_pf[seen] == 0).all())
        for z, mask in zip(rollouts.sequences(), rollouts.action_mask().tolist(), strict=True):
            want = []
            while len(want) < len(z):
                answer = _with_tool(z[: len(want) + 1]) or []
                want += [True] + [False] * min(len(answer), len(z) - len(want) - 1)
            assert mask[: len(z)] == want and not any(mask[len(z) :])
