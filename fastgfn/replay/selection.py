"""Which entries of many to take so that they are good, unlike each other and of all lengths."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastgfn import checks

SELECTIONS = ("top", "submodular", "length_balanced")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submodular:
    """Settings of the submodular selection (SubM of RapTB, arXiv:2603.00454): of m candidates the k that
    maximise

        F(S) = reward     sum_{s in S} r(s)
             + diversity  k/m sum_v max_{s in S} sim(v, s)
             + length     sum_bins log(1 + number of S in the bin)

    r is log R at the current temperatures, moved and scaled to [0, 1] among the candidates; v runs over all
    candidates; sim is the Jaccard similarity of the sets of k-grams of tokens, or the cosine of embeddings (0
    where negative) if the buffer has `embed`. F is monotone and submodular, so the greedy choice reaches
    (1 - 1/e) of the best one.

    What differs: the published gain of diversity is 1 - (largest similarity to the chosen), what an entry
    adds for itself alone, and no gain of a set function (the sum depends on the order); here an entry also
    counts for the candidates that it stands for. No separate bonus of validity, which is a factor of R; all
    length bins weigh the same.

    reward, diversity, length: weights, >= 0.
    kgram: tokens of a k-gram, >= 1; a shorter sequence is one itself.
    pool: candidates per draw, >= 1: `sample` draws pool * size by the buffer's priority and selects among
        them.
    """

    reward: float = 1.0
    diversity: float = 1.0
    length: float = 0.5
    kgram: int = 2
    pool: int = 4

    def __post_init__(self) -> None:
        for field in ("reward", "diversity", "length"):
            value = getattr(self, field)
            ok = math.isfinite(value) and value >= 0
            checks.check(ok, "Submodular", field, "finite and >= 0", value, "change this weight")
        for field in ("kgram", "pool"):
            value = getattr(self, field)
            checks.check(value >= 1, "Submodular", field, ">= 1", value, "raise it to 1")


class Similarity(Protocol):
    def row(self, i: int) -> np.ndarray:
        """(m,) similarity in [0, 1] of candidate i to every candidate."""


class KGrams:
    """Jaccard similarity of the sets of k-grams, from the lists of who has which."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], k: int) -> None:
        grams = [{z[i : i + k] for i in range(max(1, len(z) - k + 1))} for z in sequences]
        who = defaultdict(list)
        for i, own in enumerate(grams):
            for gram in own:
                who[gram].append(i)
        self._who = [[np.array(who[gram]) for gram in own] for own in grams]
        self._size = np.array([len(own) for own in grams])

    def row(self, i: int) -> np.ndarray:
        common = np.bincount(np.concatenate(self._who[i]), minlength=len(self._size))
        return common / (self._size[i] + self._size - common)


class Cosine:
    """Cosine of unit rows, 0 where it is negative."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def row(self, i: int) -> np.ndarray:
        return np.einsum("ke,e->k", self._rows, self._rows[i]).clip(0.0, 1.0)


def submodular(
    log_reward: np.ndarray, bins: Sequence[int], similarity: Similarity, size: int, settings: Submodular
) -> list[int]:
    """Up to `size` of the m candidates by greedy maximisation of F, in the order of choice; of equal gains
    the first candidate's. Gains only fall, so one is computed again only when it comes up as the largest
    (lazy evaluation): about m + size rows of similarity.
    """
    m = len(log_reward)
    size = min(size, m)
    spread = np.ptp(log_reward) if m else 0.0
    reward = (log_reward - log_reward.min()) / spread if spread > 0 else np.zeros(m)
    per_candidate = settings.diversity * size / max(1, m)
    covered, counts = np.zeros(m), Counter()

    def gain(i: int) -> float:
        value = settings.reward * reward[i] + settings.length * math.log1p(1 / (1 + counts[bins[i]]))
        if per_candidate:
            value += per_candidate * np.maximum(similarity.row(i) - covered, 0.0).sum()
        return float(value)

    heap = [(-gain(i), i, 0) for i in range(m)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < size:
        _, i, known = heapq.heappop(heap)
        if known < len(chosen):
            heapq.heappush(heap, (-gain(i), i, len(chosen)))
            continue
        chosen.append(i)
        counts[bins[i]] += 1
        if per_candidate:
            covered = np.maximum(covered, similarity.row(i))
    return chosen


def length_balanced(order: Sequence[int], bins: Sequence[int], size: int) -> list[int]:
    """Up to `size` of the entries, which are in the order of draws: the first of every length bin, then the
    second of every bin, and so on, each round in the order of draws."""
    taken: Counter = Counter()
    rounds = []
    for place, i in enumerate(order):
        rounds.append((taken[bins[i]], place, i))
        taken[bins[i]] += 1
    return [i for _, _, i in sorted(rounds)[:size]]
