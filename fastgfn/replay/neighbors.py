"""Which stored sequences are near-duplicates of a new one: exact, by edit distance or by cosine distance."""

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from fastgfn import checks
from fastgfn.replay.entries import Key

Embed = Callable[[list[list[int]]], Tensor]


class Neighbors:
    """A table with one row per stored sequence; a removed one gives its place to the last."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._rows = np.empty(0)

    def add(self, key: Key, row: np.ndarray) -> None:
        n = len(self.keys)
        if not n:
            self._rows = np.empty((8, *row.shape), row.dtype)
        elif n == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[n] = row
        self._place[key] = n
        self.keys.append(key)

    def remove(self, key: Key) -> int:
        """The place that the last row took."""
        place, last = self._place.pop(key), self.keys.pop()
        if last != key:
            self.keys[place], self._place[last] = last, place
            self._rows[place] = self._rows[len(self.keys)]
        return place

    def copy(self) -> "Neighbors":
        other = copy.copy(self)
        other.keys, other._place, other._rows = list(self.keys), dict(self._place), self._rows.copy()
        return other


class EditNeighbors(Neighbors):
    """Token edit distance below tolerance * (sum of both lengths), by rapidfuzz.

    Sequences are compared as text of one character per token, which rapidfuzz reads as it lies in memory;
    only those whose length allows a distance below the limit are looked at.
    """

    def __init__(self, tolerance: float) -> None:
        super().__init__(tolerance)
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidfuzz.process import cdist
        except ImportError:
            fix = "run `pip install 'fastgfn[replay]'` or use duplicates='exact'"
            checks.missing_package("ReplayBuffer", "rapidfuzz", fix)
        self._distance, self._cdist = Levenshtein.distance, cdist
        self._texts: list[str] = []

    def add(self, key: Key, row: np.ndarray | None = None) -> None:
        super().add(key, np.array(len(key[0])))
        self._texts.append(_text(key[0]))

    def remove(self, key: Key) -> int:
        place, last = super().remove(key), self._texts.pop()
        if place < len(self._texts):
            self._texts[place] = last
        return place

    def copy(self) -> "EditNeighbors":
        other = super().copy()
        other._texts = list(self._texts)
        return other

    def near(self, key: Key, row: np.ndarray | None = None) -> list[Key]:
        tokens, lengths = key[0], self._rows[: len(self.keys)]
        limit = self.tolerance * (lengths + len(tokens))
        maybe = np.flatnonzero(np.abs(lengths - len(tokens)) < limit)
        if not len(maybe):
            return []
        limit = limit[maybe]
        texts = self._texts if len(maybe) == len(lengths) else [self._texts[i] for i in maybe.tolist()]
        distance = self._cdist(
            [_text(tokens)],
            texts,
            scorer=self._distance,
            score_cutoff=math.ceil(limit.max()),
            dtype=np.int64,
            workers=1,
        )
        return [self.keys[i] for i in maybe[distance[0] < limit].tolist()]


class CosineNeighbors(Neighbors):
    """Cosine distance 1 - cos of two embeddings below the tolerance; rows are unit vectors."""

    def near(self, key: Key, row: np.ndarray) -> list[Key]:
        if not self.keys:
            return []
        # row by row, so that a sequence's place in the table does not change its last bit
        cosine = np.einsum("ke,e->k", self._rows[: len(self.keys)], row)
        return [self.keys[i] for i in np.flatnonzero(1.0 - cosine < self.tolerance).tolist()]


def unit_rows(embed: Embed, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """(K, E) float64 embeddings of length 1.

    Raises:
        InputError: embed returned another shape, or a row that is not finite or has length 0.
        InputTypeError: it returned something else than a floating-point tensor.
    """
    name, arg = "ReplayBuffer", "embed's result"
    value = embed([list(z) for z in sequences])
    fix = "return one row per sequence"
    if not isinstance(value, Tensor):
        have = type(value).__name__
        checks.fail(name, arg, "a floating-point tensor", have, fix, kind=checks.InputTypeError)
    checks.check_floating(name, arg, value)
    checks.check_shape(name, arg, value, (len(sequences), "E"), fix)
    value = value.detach().cpu().double()
    length = value.norm(dim=1, keepdim=True)
    bad = (~(length.isfinite() & (length > 0))).flatten().nonzero().flatten()
    if len(bad):
        have = f"a row of length {float(length[bad[0]])} for Z = {list(sequences[int(bad[0])])}"
        checks.fail(name, arg, "finite and not zero", have, "give every sequence a direction")
    return (value / length).numpy()


def _text(tokens: tuple[int, ...]) -> str:
    try:
        return "".join(map(chr, tokens))
    except (ValueError, OverflowError):
        want, fix = f"in [0, {0x110000})", "use duplicates='exact'"
        bad = next(t for t in tokens if not 0 <= t < 0x110000)
        checks.fail("ReplayBuffer", "every token id", want, bad, fix)
