"""How a buffer draws: every priority by chi-squared, balance over lengths, the submodular choice."""

import itertools
import math

import numpy as np
import pytest
import torch
from replay_cases import PROMPT, add, p_value, rollouts_of

from fastgfn.replay import ReplayBuffer, Submodular
from fastgfn.replay.selection import Cosine, KGrams, submodular

N = 4000
LOG_R = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
RECENT = [2 ** (-a / 2) for a in (3, 2, 1, 0)]
RECENT = [w / sum(RECENT) for w in RECENT]
PAIRS = list(itertools.combinations(range(4), 2))


def _pair_probabilities(p):
    """Of the sets of two draws without replacement."""
    return [p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]) for a, b in PAIRS]


def _draws(buffer, size, num=N, **options):
    """The first tokens of `num` independent draws: a prompt is drawn for as often as it is listed."""
    like = rollouts_of([[0]], prompts=(PROMPT,) * num)
    drawn = buffer.sample(like, size, np.random.default_rng(5), **options)
    found = [[] for _ in range(num)]
    for g, z in zip(drawn.group.tolist(), drawn.sequences(), strict=True):
        found[g].append(z[0])
    return [tuple(sorted(some)) for some in found]


@pytest.mark.parametrize(
    ("options", "p"),
    [
        ({"priority": "reward"}, (0.4, 0.3, 0.2, 0.1)),
        ({"priority": "uniform"}, (0.25,) * 4),
        ({"priority": "recency", "half_life": 2.0}, RECENT),
        ({"priority": "mix", "half_life": 2.0, "recency_share": 1.0}, RECENT),
        ({"priority": "mix", "half_life": 2.0, "recency_share": 0.0}, (0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_draws_without_replacement_follow_the_priority(options, p):
    buffer = ReplayBuffer(4, duplicates="exact", **options)
    add(buffer, [[i] for i in range(4)], LOG_R)
    draws = _draws(buffer, 2)
    assert p_value([draws.count(pair) for pair in PAIRS], _pair_probabilities(p)) > 1e-3


def test_the_shares_of_a_mix():
    buffer = ReplayBuffer(4, duplicates="exact", priority="mix", half_life=2.0, recency_share=0.3)
    add(buffer, [[i] for i in range(4)], LOG_R)
    draws = _draws(buffer, 1)
    want = [0.3 * a + 0.7 * b for a, b in zip(RECENT, (0.4, 0.3, 0.2, 0.1), strict=True)]
    assert p_value([draws.count((i,)) for i in range(4)], want) > 1e-3
    # a half: of two draws always one by recency, which is the newest here
    buffer = ReplayBuffer(4, duplicates="exact", priority="mix", half_life=0.0, recency_share=0.5)
    add(buffer, [[i] for i in range(4)], LOG_R)
    draws = _draws(buffer, 2, 2000)
    # recency first, or reward first (which may have drawn the newest): either with probability 1/2
    want = [0.5 * p / 0.9 + 0.5 * p for p in (0.4, 0.3, 0.2)]
    want[2] += 0.5 * 0.1
    assert p_value([draws.count((i, 3)) for i in range(3)], want) > 1e-3
    assert all(3 in pair for pair in draws)


def test_draws_by_reward_follow_the_temperatures():
    buffer = ReplayBuffer(4, duplicates="exact", factors=("a", "b"))
    factors = [[-1.0, -2.0], [-2.0, 0.0], [0.0, -3.0], [-3.0, -1.0]]
    add(buffer, [[i] for i in range(4)], factors)
    for temperatures, over in (((1.0, 1.0), 1.0), ((2.0, 0.8), 1.0), ((0.7, 3.0), 2.0)):
        log_r = (torch.tensor(factors) / torch.tensor(temperatures) / over).double().sum(1)
        draws = _draws(buffer, 1, temperatures=temperatures, temperature=over)
        assert p_value([draws.count((i,)) for i in range(4)], log_r.softmax(0).tolist()) > 1e-3


def test_half_life_zero_draws_the_newest():
    buffer = ReplayBuffer(5, duplicates="exact", priority="recency", half_life=0.0)
    add(buffer, [[i] for i in range(5)], [0.0, -1.0, -2.0, -3.0, -4.0])
    add(buffer, [[1]], [-1.0])
    for size, want in ((1, (1,)), (2, (1, 4)), (3, (1, 3, 4))):
        assert set(_draws(buffer, size, 20)) == {want}


def test_length_balanced_draws():
    """As many of every bin as there are; within a bin by the priority."""
    buffer = ReplayBuffer(30, duplicates="exact", selection="length_balanced", length_bin=2)
    zs = [[i] * n for n, count in ((1, 12), (3, 5), (5, 1)) for i in range(count)]
    add(buffer, zs, [math.log(i + 1) for i in range(12)] + [0.0] * 6)
    like = rollouts_of([[0] * 5], prompts=(PROMPT,) * 2000)
    drawn = buffer.sample(like, 3, np.random.default_rng(7))
    for g in range(2000):
        assert sorted(drawn.lengths[drawn.group == g].tolist()) == [1, 3, 5]
    firsts = [z[0] for z in drawn.sequences() if len(z) == 1]
    assert p_value([firsts.count(i) for i in range(12)], [(i + 1) / 78 for i in range(12)]) > 1e-3
    like = rollouts_of([[0] * 5])
    for size, want in ((9, (4, 4, 1)), (18, (12, 5, 1)), (40, (12, 5, 1))):
        got = buffer.sample(like, size, np.random.default_rng(0)).sequences()
        assert tuple([len(z) for z in got].count(n) for n in (1, 3, 5)) == want


def _value(chosen, log_reward, bins, rows, size, settings):
    """F of the docstring of Submodular, as it is written there."""
    m, r = len(log_reward), (log_reward - log_reward.min()) / np.ptp(log_reward)
    covered = rows[list(chosen)].max(0).sum() if chosen else 0.0
    counts = [sum(bins[i] == b for i in chosen) for b in set(bins)]
    return (
        settings.reward * sum(r[i] for i in chosen)
        + settings.diversity * size / m * covered
        + settings.length * sum(math.log(1 + n) for n in counts)
    )


def _jaccard(a, b, k):
    x, y = ({z[i : i + k] for i in range(max(1, len(z) - k + 1))} for z in (a, b))
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("seed", range(12))
def test_the_greedy_choice_against_all_choices(seed):
    rng = np.random.default_rng([8, seed])
    m, size, k = 11, int(rng.integers(2, 5)), int(rng.integers(1, 4))
    zs = [tuple(rng.integers(0, 3, size=rng.integers(0, 7)).tolist()) for _ in range(m)]
    log_reward, bins = rng.normal(size=m), [len(z) // 2 for z in zs]
    if seed % 3 == 0:
        rows = rng.normal(size=(m, 4))
        similarity = Cosine(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        rows = (similarity._rows @ similarity._rows.T).clip(0)
    else:
        similarity, rows = KGrams(zs, k), np.array([[_jaccard(a, b, k) for b in zs] for a in zs])
    for i in range(m):
        np.testing.assert_allclose(similarity.row(i), rows[i], atol=1e-12)
    weights = rng.uniform(0, 2, size=3).tolist()
    settings = Submodular(reward=weights[0], diversity=weights[1], length=weights[2])

    def value(chosen):
        return _value(chosen, log_reward, bins, rows, size, settings)

    got = submodular(log_reward, bins, similarity, size, settings)
    assert len(set(got)) == size
    # every choice is the best next one, though most gains were not computed again
    for n in range(size):
        gains = [value([*got[:n], i]) for i in range(m) if i not in got[:n]]
        assert value(got[: n + 1]) == pytest.approx(max(gains), abs=1e-9)
    best = max(map(value, itertools.combinations(range(m), size)))
    assert (1 - 1 / math.e) * best <= value(got) <= best + 1e-9


def _clustered():
    """Good sequences that are alike, and worse ones that are not, some long."""
    alike = [[1, 2, 3, 4, 5, 6, 7, 8, 9, i] for i in range(20, 36)]
    others = [[10 * n + j for j in range(3 + 4 * (n % 3))] for n in range(4, 12)]
    return alike + others, [0.0 - 0.01 * i for i in range(16)] + [-1.0 - 0.1 * i for i in range(8)]


def _mean_similarity(zs):
    pairs = list(itertools.combinations(map(tuple, zs), 2))
    return sum(_jaccard(a, b, 2) for a, b in pairs) / len(pairs)


def test_submodular_draws_are_less_alike_than_the_best():
    zs, rewards = _clustered()
    drawn, lengths = {}, {}
    for selection in ("top", "submodular"):
        options = dict(selection=selection, submodular=Submodular(pool=3, reward=0.5))
        buffer = ReplayBuffer(50, duplicates="exact", **options)
        add(buffer, zs, [8 * r for r in rewards])
        got = [
            buffer.sample(rollouts_of([[0] * 11]), 8, np.random.default_rng([9, i])).sequences()
            for i in range(10)
        ]
        drawn[selection] = sum(map(_mean_similarity, got)) / 10
        lengths[selection] = sum(len({len(z) // 4 for z in some}) for some in got) / 10
        assert all(len(some) == 8 for some in got)
    assert drawn["submodular"] < 0.5 * drawn["top"] and lengths["submodular"] > lengths["top"]


@pytest.mark.parametrize("embedding", [False, True])
def test_a_submodular_buffer_keeps_the_greedy_choice(embedding):
    zs, rewards = _clustered()

    def embed(sequences):
        return torch.tensor([[float(z.count(t)) for t in range(1, 130)] for z in sequences]).clamp(min=1e-3)

    options = dict(duplicates="exact", keep="submodular", submodular=Submodular(reward=0.5))
    buffer = ReplayBuffer(6, **options, embed=embed if embedding else None)
    top = ReplayBuffer(6, duplicates="exact")
    for b in (buffer, top):
        add(b, zs, rewards)
    kept = [list(e.tokens) for e in buffer.entries(PROMPT)]
    order = sorted(range(len(zs)), key=lambda i: (rewards[i], zs[i]), reverse=True)
    zs, values = [zs[i] for i in order], np.array([rewards[i] for i in order])
    rows = embed(zs).double().numpy()
    similarity = Cosine(rows / np.linalg.norm(rows, axis=1, keepdims=True)) if embedding else KGrams(
        list(map(tuple, zs)), 2
    )  # fmt: skip
    want = submodular(values, [len(z) // 4 for z in zs], similarity, 6, Submodular(reward=0.5))
    assert sorted(kept) == sorted(zs[i] for i in want)
    assert _mean_similarity(kept) < 0.5 * _mean_similarity([e.tokens for e in top.entries(PROMPT)])
    # what is left is in order, goes on and survives
    copy = ReplayBuffer(6, **options, embed=embed if embedding else None)
    copy.load_state(buffer.state())
    for b in (buffer, copy):
        add(b, [[77, 78], [88]], [-0.5, -9.0])
    assert copy.state() == buffer.state() and len(buffer) == 6
