"""The entries of one prompt in order of their value, with near-duplicates to be found."""

import heapq
from collections.abc import Iterable, Sequence

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
    """Entries by key, oldest first, and a heap of their values whose top is the worst.

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
        self.entries[key], self._values[key] = entry, value
        heapq.heappush(self._heap, value)
        if self.neighbors is not None:
            self.neighbors.add(key, row)
        if row is not None:
            self.rows[key] = row
        if len(self._heap) > 2 * len(self.entries) + 8:
            self._rebuild()

    def refresh(self, entry: Entry) -> None:
        """Replace the entry of this key by one of equal factors, the newest now."""
        key = entry.key
        del self.entries[key]
        self.entries[key], self._values[key] = entry, self._values.pop(key)

    def drop(self, key: Key) -> None:
        del self.entries[key], self._values[key]
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
            self.weights = weights
            self._values = {key: value_of(entry, weights) for key, entry in self.entries.items()}
            self._rebuild()

    def near(self, key: Key, row: np.ndarray | None) -> list[Value]:
        """The values of the near-duplicates."""
        near = () if self.neighbors is None else self.neighbors.near(key, row)
        return [self._values[k] for k in near]

    def ranks(self) -> np.ndarray:
        """(n,) log R under the weights."""
        return np.fromiter((value[0] for value in self._values.values()), np.float64, len(self._values))

    def best_first(self, places: Iterable[int]) -> list[int]:
        """The places of some entries, sorted."""
        values = list(self._values.values())
        return sorted(places, key=values.__getitem__, reverse=True)

    def expire(self, oldest: int) -> None:
        """Drop what is of a version before `oldest`."""
        if self.oldest < oldest:
            for key in [e.key for e in self.entries.values() if e.version < oldest]:
                self.drop(key)
            self.oldest = min((e.version for e in self.entries.values()), default=oldest)

    def _rebuild(self) -> None:
        self._heap = list(self._values.values())
        heapq.heapify(self._heap)
