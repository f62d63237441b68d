"""Local search: where it starts, where it cuts, what it accepts."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from fastgfn.behavior.local_search import Points, best_rows, log_acceptance, random_rows, search
from fastgfn.behavior.rows import of_sequences
from fastgfn.evaluate.annealing import num_cuts
from fastgfn.types import Constraints

PROMPT = [1, 2]


def _random_chain(seed, longest=3, letters=3):
    """A random q over all sequences of at most `longest` letters and a random R; log q by sequence."""
    rng = np.random.default_rng(seed)
    log_q, prefix = {}, {(): 0.0}
    for k in range(longest + 1):
        for z in product(range(1, letters + 1), repeat=k):
            p = rng.dirichlet(np.ones(letters + 1)) if k < longest else np.eye(letters + 1)[0]
            log_q[z] = prefix[z] + math.log(p[0])
            for letter in range(1, letters + 1) if k < longest else ():
                prefix[(*z, letter)] = prefix[z] + math.log(p[letter])
    return log_q, prefix, {z: float(rng.normal()) for z in log_q}


def _points(sequences, log_r, log_q, longest=3):
    rollouts = of_sequences([PROMPT], [0] * len(sequences), sequences, Constraints(0, max_length=longest))
    values = ([f[tuple(z)] for z in sequences] for f in (log_r, log_q))
    return Points(rollouts, *(torch.tensor(v, dtype=torch.float64) for v in values))


def test_metropolis_is_in_detailed_balance_with_the_tempered_reward():
    log_q, prefix, log_r = _random_chain(0)
    pairs = [(x, y) for x in log_q for y in log_q]
    old, new = (_points([list(p[i]) for p in pairs], log_r, log_q) for i in (0, 1))
    accepted = log_acceptance(old, new, accept="metropolis", reward_temperature=0.6).tolist()
    places = num_cuts(old.rollouts.lengths, 3).tolist()
    assert places == [min(len(x), 2) + 1 for x, _ in pairs]
    flow = {}
    for (x, y), log_a, n in zip(pairs, accepted, places, strict=True):
        common = next((k for k, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        cuts = range(min(common, n - 1, 2) + 1)
        proposed = sum(math.exp(log_q[y] - prefix[x[:k]]) for k in cuts) / n
        flow[x, y] = math.exp(log_r[x] / 0.6 + log_a) * proposed
    assert max(abs(flow[x, y] - flow[y, x]) for x, y in pairs) < 1e-12
    total = sum(math.exp(log_q[y] - prefix[()]) for y in log_q)
    assert total == pytest.approx(1.0), "what the check proposes from is a distribution"
    better = log_acceptance(old, new, accept="better", reward_temperature=0.6)
    assert [math.exp(v) for v in better.tolist()] == [float(log_r[y] >= log_r[x]) for x, y in pairs]
    assert not bool(log_acceptance(old, new, accept="always", reward_temperature=0.6).any())


@pytest.mark.parametrize("accept", ["always", "better", "metropolis"])
def test_a_search_moves_as_a_loop_over_its_rows_would(accept):
    log_q, _, log_r = _random_chain(1)
    start = [[1, 2, 3], [2], [], [3, 3], [1, 1, 1]] * 40
    seen, source = [], np.random.default_rng(5)

    def grow(rollouts, prefixes):
        room = [source.integers(0, 4 - len(p)) for p in prefixes]
        grown = [p + source.integers(1, 4, size=n).tolist() for p, n in zip(prefixes, room, strict=True)]
        seen.append((rollouts.sequences(), prefixes, grown))
        return of_sequences([PROMPT], [0] * len(grown), grown, rollouts.constraints)

    def judge(rollouts):
        points = _points(rollouts.sequences(), log_r, log_q)
        return points.log_reward, points.log_q

    found = search(
        _points(start, log_r, log_q), grow=grow, judge=None if accept == "always" else judge, rounds=3,
        accept=accept, reward_temperature=0.6, rng=np.random.default_rng(2),
    )  # fmt: skip
    rng, current, cuts = np.random.default_rng(2), start, []
    for (before, prefixes, grown), kept in zip(seen, found, strict=True):
        assert before == current
        draws = rng.integers(0, [min(len(z), 2) + 1 for z in current])
        coins = np.log(rng.random(len(current)))
        assert prefixes == [z[:k] for z, k in zip(current, draws, strict=True)]
        moves = []
        for x, y, coin in zip(current, grown, coins, strict=True):
            gain, x, y = log_r[tuple(y)] - log_r[tuple(x)], tuple(x), tuple(y)
            ratio = math.log((min(len(x), 2) + 1) / (min(len(y), 2) + 1))
            rule = {"always": True, "better": gain >= 0}
            moves.append(rule.get(accept, coin < gain / 0.6 + log_q[x] - log_q[y] + ratio))
        assert kept.sequences() == [y for y, move in zip(grown, moves, strict=True) if move]
        assert accept == "always" or 0 < sum(moves) < len(moves)
        current = [y if move else x for x, y, move in zip(current, grown, moves, strict=True)]
        cuts += [k for z, k in zip(before, draws.tolist(), strict=True) if len(z) >= 2]
    counts = np.bincount(cuts, minlength=3)
    assert float(((counts - len(cuts) / 3) ** 2 / (len(cuts) / 3)).sum()) < 13.8, "uniform, p = 1e-3"


def test_searches_start_from_the_best_or_from_random_draws():
    sequences, group = [[1], [2], [1], [3], [2, 2], [1], [3, 1]], [0, 1, 0, 0, 1, 1, 0]
    value = torch.tensor([2.0, 5.0, 2.0, -1.0, 7.0, 0.0, 2.0], dtype=torch.float64)
    rollouts = of_sequences([PROMPT, [3]], group, sequences, Constraints(0, max_length=2))
    assert best_rows(rollouts, value, 2).tolist() == [4, 1, 0, 6], (
        "of equal sequences one, of equal R the first"
    )
    rows = random_rows(rollouts, 2, np.random.default_rng(0)).tolist()
    assert [group[n] for n in rows] == [0, 0, 1, 1] and len(set(rows)) == 4
    firsts = {random_rows(rollouts, 1, np.random.default_rng(i))[0].item() for i in range(40)}
    assert firsts == {0, 2, 3, 6}
