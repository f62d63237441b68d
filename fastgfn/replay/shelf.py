"""The entries of one prompt in order of their value, with near-duplicates to be found."""

import heapq
from collections.abc import Sequence

import numpy as np

from fastgfn.replay.entries import Entry, Key
from fastgfn.replay.neighbors import Neighbors

Value = tuple[float, tuple[int, ...], tuple[int, ...]]


def value_of(entry: Entry, weights: Sequence[float]) -> Value:
    """What entries are compared by: log R under the weights, ties by tokens, so that eviction is
    reproducible."""
    rank = entry.factors[0] * weights[0]
    for factor, weight in zip(entry.factors[1:], weights[1:], strict=True):
        rank += factor * weight
    return rank, entry.tokens, entry.observed


class Shelf:
    """Entries by key, and a heap of their values whose top is the worst.

    Removing an entry leaves its value in the heap, where it is passed over when it comes up; so eviction
    costs O(log n) amortised.

    oldest: no entry is of an earlier version.
    rows: embeddings, of a buffer that has them.
    """

    def __init__(self, weights: tuple[float, ...], neighbors: Neighbors | None) -> None:
        self.weights = weights
        self.neighbors = neighbors
        self.entries: dict[Key, Entry] = {}
        self.rows: dict[Key, np.ndarray] = {}
        self.oldest = 0
        self._values: dict[Key, Value] = {}
        self._heap: list[Value] = []
        self._ordered: tuple[list[Entry], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def copy(self) -> "Shelf":
        other = Shelf(self.weights, self.neighbors and self.neighbors.copy())
        other.entries, other.rows = dict(self.entries), dict(self.rows)
        other.oldest, other._values, other._heap = self.oldest, dict(self._values), list(self._heap)
        return other

    def put(self, entry: Entry, row: np.ndarray | None) -> None:
        """Add an entry whose key is new; row: its embedding."""
        self.oldest = min(self.oldest, entry.version) if self.entries else entry.version
        key, value = entry.key, value_of(entry, self.weights)
        self.entries[key], self._values[key], self._ordered = entry, value, None
        heapq.heappush(self._heap, value)
        if self.neighbors is not None:
            self.neighbors.add(key, row)
        if row is not None:
            self.rows[key] = row
        if len(self._heap) > 2 * len(self.entries) + 8:
            self._rebuild()

    def refresh(self, entry: Entry) -> None:
        """Replace the entry of this key by one of equal factors."""
        self.entries[entry.key], self._ordered = entry, None

    def drop(self, key: Key) -> None:
        del self.entries[key], self._values[key]
        self._ordered = None
        if self.neighbors is not None:
            self.neighbors.remove(key)
        self.rows.pop(key, None)

    def worst(self) -> Value:
        """The lowest value of at least one entry; from its second place on it is the entry's key."""
        while self._values.get(self._heap[0][1:]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def reweigh(self, weights: tuple[float, ...]) -> None:
        """Order by other weights, O(n)."""
        if weights != self.weights:
            self.weights, self._ordered = weights, None
            self._values = {key: value_of(entry, weights) for key, entry in self.entries.items()}
            self._rebuild()

    def near(self, key: Key, row: np.ndarray | None) -> list[Value]:
        """The values of the near-duplicates."""
        near = () if self.neighbors is None else self.neighbors.near(key, row)
        return [self._values[k] for k in near]

    def ordered(self) -> tuple[list[Entry], np.ndarray]:
        """The entries, worst first, and (n,) log R under the weights."""
        if self._ordered is None:
            values = sorted(self._values.values())
            ranks = np.array([value[0] for value in values])
            self._ordered = [self.entries[value[1:]] for value in values], ranks
        return self._ordered

    def expire(self, oldest: int) -> None:
        """Drop what is of a version before `oldest`."""
        if self.oldest < oldest:
            for key in [e.key for e in self.entries.values() if e.version < oldest]:
                self.drop(key)
            self.oldest = min((e.version for e in self.entries.values()), default=oldest)

    def _rebuild(self) -> None:
        self._heap = list(self._values.values())
        heapq.heapify(self._heap)
