"""`ReplayBuffer`: what is kept of every prompt's trajectories, what is drawn again, and its durable state."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.replay.draws import PRIORITIES, draw_order
from fastgfn.replay.entries import Entry, entries_of
from fastgfn.replay.neighbors import CosineNeighbors, EditNeighbors, Embed, unit_rows
from fastgfn.replay.selection import SELECTIONS, Cosine, KGrams, Submodular, length_balanced, submodular
from fastgfn.replay.shelf import Shelf, value_of
from fastgfn.types import Rollouts

DUPLICATES = ("near", "exact", "embedding")
KEEP = ("top", "submodular")


class ReplayBuffer:
    """Sequences per prompt, best rewards kept.

    Args:
        capacity: entries per prompt.
        duplicates: "near" (default) also rejects a sequence whose edit distance to a stored one is below
            tolerance * (sum of both lengths), unless it beats every such neighbour, which it then replaces;
            "embedding" likewise where 1 - cosine of the embeddings is below tolerance; "exact" rejects equal
            sequences only. "near" needs rapidfuzz, "embedding" needs `embed`. An equal sequence that is drawn
            again gives the stored one its version, log_behavior and order: it is as new.
        tolerance: see above; 0.25 is the paper's.
        priority: how `sample` draws, without replacement: "reward" proportional to R at the current
            temperatures, "uniform", "recency" to 2^(-a / half_life) where a entries of the prompt are newer,
            or "mix", see fastgfn.replay.draws.
        half_life: entries after which the weight of recency is half; 0: the newest ones.
        recency_share: share of the draws of "mix" that go by recency, the others by reward.
        selection: what `sample` returns: "top" the draws, "length_balanced" equally many of every length bin
            as far as there are, "submodular" a subset of `submodular.pool` times as many draws, see
            `Submodular`.
        keep: what stays when there is no room: "top" the best, "submodular" the greedy choice among the
            stored and the new entries after every `add`, which costs O(capacity^2).
        submodular: settings of both; None: the defaults.
        length_bin: lengths per bin: bin i has length_bin * i to length_bin * (i + 1) - 1 tokens.
        max_age: entries of a policy version more than this before the current one are removed when their
            prompt comes up; None: never.
        factors: names of the factors of R, whose number and order `add` goes by.
        embed: callable(list of Z) -> (K, E) tensor, the same row for a sequence whatever else is in the list;
            it replaces k-grams in `submodular`, too.

    Raises:
        InputError: a setting out of its range; the message names it.
        MissingPackageError: duplicates="near" without rapidfuzz.
    """

    def __init__(
        self,
        capacity: int = 50,
        *,
        duplicates: str = "near",
        tolerance: float = 0.25,
        priority: str = "reward",
        half_life: float = 10.0,
        recency_share: float = 0.5,
        selection: str = "top",
        keep: str = "top",
        submodular: Submodular | None = None,
        length_bin: int = 4,
        max_age: int | None = None,
        factors: Sequence[str] = ("log_reward",),
        embed: Embed | None = None,
    ) -> None:
        self.capacity = capacity
        self.duplicates = duplicates
        self.tolerance = tolerance
        self.priority = priority
        self.half_life = half_life
        self.recency_share = recency_share
        self.selection = selection
        self.keep = keep
        self.submodular = Submodular() if submodular is None else submodular
        self.length_bin = length_bin
        self.max_age = max_age
        self.factors = tuple(factors)
        self.embed = embed
        self._check()
        self.version = 0  # the latest one heard of
        self.temperatures = (1.0,) * len(self.factors)
        self._given = 0
        self._shelves: dict[tuple[int, ...], Shelf] = {}
        self._own: set[tuple[int, ...]] = set()  # prompts whose shelf is in no snapshot
        self._new_shelf()  # names a missing package now

    def _check(self) -> None:
        def need(ok: bool, arg: str, want: str, fix: str) -> None:
            checks.check(ok, "ReplayBuffer", arg, want, repr(getattr(self, arg)), fix)

        need(self.capacity >= 1, "capacity", ">= 1", "raise it, or train without replay")
        known = {"duplicates": DUPLICATES, "priority": PRIORITIES, "selection": SELECTIONS, "keep": KEEP}
        for arg, names in known.items():
            want = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
            need(getattr(self, arg) in names, arg, want, f"use {names[0]!r}")
        most = 2.0 if self.duplicates == "embedding" else 1.0
        need(0.0 <= self.tolerance <= most, "tolerance", f"in [0, {most:g}]", "use 0.25")
        need(0.0 <= self.half_life < math.inf, "half_life", "finite and >= 0", "use 10.0")
        need(0.0 <= self.recency_share <= 1.0, "recency_share", "in [0, 1]", "use 0.5")
        need(self.length_bin >= 1, "length_bin", ">= 1", "raise it to 1")
        need(self.max_age is None or self.max_age >= 1, "max_age", ">= 1 or None", "raise it")
        distinct = len(set(self.factors)) == len(self.factors) > 0
        need(distinct, "factors", "distinct names, one at least", "name every factor once")
        has_embed = self.embed is not None or self.duplicates != "embedding"
        need(has_embed, "embed", "a callable with duplicates='embedding'", "pass embed, or use 'near'")

    def __len__(self) -> int:
        return sum(map(len, self._shelves.values()))

    def entries(self, prompt: Sequence[int]) -> list[Entry]:
        """Stored entries of a prompt, worst first at the current temperatures."""
        shelf = self._shelf(tuple(prompt))
        weights = self._weights()
        return [] if shelf is None else sorted(shelf.entries.values(), key=lambda e: value_of(e, weights))

    def retemper(self, temperatures: Sequence[float]) -> None:
        """Set the temperature of every factor: log R = sum_k factor_k / T_k orders the entries and weighs the
        draws. Entries are ordered again, O(n), where the ratios of the temperatures change.

        Raises:
            InputError: not one finite temperature > 0 per factor.
        """
        values = tuple(map(float, temperatures))
        ok = len(values) == len(self.factors) and all(math.isfinite(t) and t > 0 for t in values)
        want, fix = f"{len(self.factors)} finite numbers > 0", f"pass one for each of {self.factors}"
        checks.check(ok, "ReplayBuffer.retemper", "temperatures", want, values, fix)
        self.temperatures = values

    def add(self, rollouts: Rollouts, log_reward: Tensor, *, version: int = 0) -> int:
        """Insert the trajectories; returns how many were new. What a tool returned stays marked as that.

        Args:
            log_reward: (N,) un-tempered terminal log R, or (N, K) its factors.
            version: optimiser steps that the policy which drew them had done.

        Raises:
            InputError: log_reward has another shape or a non-finite value (factor and sequence are named), or
                what `embed` returned does not fit.
        """
        name, count = "ReplayBuffer.add", len(self.factors)
        raw = log_reward[:, None] if log_reward.dim() == 1 and count == 1 else log_reward
        num = rollouts.num_trajectories
        have, want = tuple(log_reward.shape), f"({num},)" if count == 1 else f"({num}, {count})"
        fix = "one value per trajectory" if count == 1 else f"one column for each of {self.factors}"
        checks.check(tuple(raw.shape) == (num, count), name, "log_reward", want, have, fix)
        bad = (~raw.isfinite()).nonzero()
        if len(bad):
            n, k = bad[0].tolist()
            have = f"{float(raw[n, k])} ({self.factors[k]}) for Z = {rollouts.sequences()[n]}"
            if len(bad) == raw.numel():
                have = f"{have} and no finite value at all"
            checks.fail(name, "log_reward", "finite", have, "clamp it")
        entries = entries_of(rollouts, raw.tolist(), version, self._given)
        rows = self._embedded(entries)
        self.version = max(self.version, version)
        self._given += len(entries)
        prompts = [tuple(p.tolist()) for p in rollouts.prompts]
        touched, new = {}, 0
        for g, entry, row in zip(rollouts.group.tolist(), entries, rows, strict=True):
            shelf = touched[prompts[g]] = self._writable(prompts[g])
            new += self._insert(shelf, entry, row)
        for shelf in touched.values() if self.keep == "submodular" else ():
            self._reselect(shelf)
        return new

    def _insert(self, shelf: Shelf, entry: Entry, row: np.ndarray | None) -> bool:
        stored = shelf.entries.get(entry.key)
        if stored is not None:
            if entry.version >= stored.version:
                shelf.refresh(replace(entry, factors=stored.factors))
            return False
        value, bounded = value_of(entry, shelf.weights), self.keep == "top"
        if bounded and len(shelf) >= self.capacity and value < shelf.worst():
            return False
        near = shelf.near(entry.key, row)
        if near and max(near) > value:
            return False
        for _, *key in near:
            shelf.drop(tuple(key))
        if bounded and len(shelf) >= self.capacity:
            shelf.drop(shelf.worst()[1:])
        shelf.put(entry, row)
        return True

    def _reselect(self, shelf: Shelf) -> None:
        """Keep the greedy choice of `capacity` entries."""
        if len(shelf) <= self.capacity:
            return
        chosen = set(self._select(shelf, range(len(shelf)), self.capacity))
        for i, key in enumerate(list(shelf.entries)):
            if i not in chosen:
                shelf.drop(key)

    def sample(
        self,
        rollouts: Rollouts,
        num_samples: int,
        rng: np.random.Generator,
        *,
        temperature: float = 1.0,
        temperatures: Sequence[float] | None = None,
        version: int | None = None,
    ) -> Rollouts | None:
        """Up to `num_samples` stored sequences for each prompt of `rollouts`, or None if nothing is stored.

        The result has the prompts and constraints of `rollouts`, and its grammar if it has one, which
        `pack` asks about them again; its log_behavior is that of the distribution which once drew the
        sequence (NaN: unknown), not of the choice here.

        Args:
            temperature: draws by reward are in proportion to R^(1 / temperature).
            temperatures: of the factors of R from now on, see `retemper`; None: as they are.
            version: of the policy now, for max_age; None: the latest one of `add`.
        """
        if temperatures is not None:
            self.retemper(temperatures)
        if version is not None:
            self.version = max(self.version, version)
        ok, fix = math.isfinite(temperature) and temperature > 0, "use 1.0"
        checks.check(ok, "ReplayBuffer.sample", "temperature", "finite and > 0", temperature, fix)
        stored, group = [], []
        for g, prompt in enumerate(rollouts.prompts):
            key = tuple(prompt.tolist())
            expires = self.max_age is not None and key in self._shelves
            shelf = self._writable(key) if expires else self._shelf(key)
            if shelf is not None and len(shelf):
                chosen = self._choose(shelf, min(num_samples, len(shelf)), rng, temperature)
                entries = list(shelf.entries.values())
                stored += [entries[i] for i in chosen]
                group += [g] * len(chosen)
        return _as_rollouts(stored, group, rollouts) if stored else None

    def _choose(self, shelf: Shelf, size: int, rng: np.random.Generator, temperature: float) -> list[int]:
        """Which of the shelf's entries to draw, ascending."""
        order = draw_order(
            self.priority,
            shelf.ranks() / (self.temperatures[0] * temperature),
            np.arange(len(shelf))[::-1],
            rng,
            half_life=self.half_life,
            recency_share=self.recency_share,
        ).tolist()
        if self.selection == "length_balanced":
            return sorted(length_balanced(order, self._bins(shelf.entries.values()), size))
        if self.selection == "submodular":
            return sorted(self._select(shelf, order[: size * self.submodular.pool], size))
        return sorted(order[:size])

    def _select(self, shelf: Shelf, pool: Sequence[int], size: int) -> list[int]:
        """The submodular choice among the entries of the shelf at the places `pool`."""
        pool, entries = shelf.best_first(pool), list(shelf.entries.values())
        some = [entries[i] for i in pool]
        if self.embed is None:
            similarity = KGrams([e.tokens for e in some], self.submodular.kgram)
        else:
            similarity = Cosine(np.stack([shelf.rows[e.key] for e in some]))
        chosen = submodular(shelf.ranks()[pool], self._bins(some), similarity, size, self.submodular)
        return [pool[i] for i in chosen]

    def _weights(self) -> tuple[float, ...]:
        """Of the factors, up to a common temperature, which changes no order: 1 for the first."""
        return tuple(self.temperatures[0] / t for t in self.temperatures)

    def _bins(self, entries: Iterable[Entry]) -> list[int]:
        return [len(e.tokens) // self.length_bin for e in entries]

    def _embedded(self, entries: list[Entry]) -> Sequence[np.ndarray | None]:
        reads = self.duplicates == "embedding" or "submodular" in (self.selection, self.keep)
        if self.embed is None or not reads or not entries:
            return [None] * len(entries)
        rows = unit_rows(self.embed, [e.tokens for e in entries])
        stored = next((row for s in self._shelves.values() for row in s.rows.values()), rows[0])
        want, have = len(stored), rows.shape[1]
        checks.check(want == have, "ReplayBuffer", "embed's width", want, have, "return rows of one width")
        return rows

    def _new_shelf(self) -> Shelf:
        kinds = {"near": EditNeighbors, "embedding": CosineNeighbors}
        kind = kinds.get(self.duplicates)
        return Shelf(self._weights(), None if kind is None else kind(self.tolerance))

    def _shelf(self, prompt: tuple[int, ...]) -> Shelf | None:
        """The prompt's shelf, to be read, ordered by the current temperatures."""
        shelf = self._shelves.get(prompt)
        if shelf is not None:
            shelf.reweigh(self._weights())
        return shelf

    def _writable(self, prompt: tuple[int, ...]) -> Shelf:
        """The prompt's shelf, in no snapshot, ordered by the current temperatures, nothing expired."""
        shelf = self._shelf(prompt)
        if prompt not in self._own:
            self._own.add(prompt)
            shelf = self._shelves[prompt] = self._new_shelf() if shelf is None else shelf.copy()
        if self.max_age is not None:
            shelf.expire(self.version - self.max_age)
        return shelf

    def state(self) -> dict:
        """JSON-ready contents, the oldest entries first; floats survive exactly."""
        prompts = {
            ",".join(map(str, p)): [e.row() for e in shelf.entries.values()]
            for p, shelf in self._shelves.items()
        }
        return {
            "factors": list(self.factors),
            "temperatures": list(self.temperatures),
            "version": self.version,
            "given": self._given,
            "entries": prompts,
        }

    def load_state(self, state: dict) -> None:
        """Take over a `state`, or one of [log R, tokens, observed] rows alone, which a buffer of one factor
        wrote before it kept more: their version is 0, the worst are the oldest.

        Raises:
            InputError: it has other factors; nothing is changed.
        """
        names = tuple(state.get("factors", ("log_reward",)))
        fix = "load it with the reward that it was stored with"
        same = names == self.factors or ("factors" not in state and len(self.factors) == 1)
        checks.check(same, "ReplayBuffer.load_state", "factors", self.factors, names, fix)
        before, given, shelves = self.snapshot(), 0, {}
        try:
            self.retemper(state.get("temperatures", (1.0,) * len(self.factors)))
            for prompt, rows in state["entries"].items():
                shelf = self._new_shelf()
                entries = [Entry.from_row(row, given + n) for n, row in enumerate(rows)]
                given += len(entries)
                for entry, row in zip(entries, self._embedded(entries), strict=True):
                    shelf.put(entry, row)
                while len(shelf) > self.capacity:
                    shelf.drop(shelf.worst()[1:])
                shelves[tuple(map(int, prompt.split(","))) if prompt else ()] = shelf
        except BaseException:
            self.restore(before)
            raise
        self._shelves, self._own = shelves, set(shelves)
        self.version, self._given = state.get("version", 0), state.get("given", given)

    def snapshot(self) -> dict:
        """The contents as they are now, for `restore`; what is stored later does not change it. It shares the
        entries: each prompt's are copied when that prompt is next written to."""
        self._own = set()
        return {
            "shelves": dict(self._shelves),
            "temperatures": self.temperatures,
            "version": self.version,
            "given": self._given,
        }

    def restore(self, snapshot: dict) -> None:
        """Take over the contents of a `snapshot`, which stays as it is."""
        self._shelves, self._own = dict(snapshot["shelves"]), set()
        self.temperatures, self.version = snapshot["temperatures"], snapshot["version"]
        self._given = snapshot["given"]


def _as_rollouts(stored: list[Entry], group: list[int], like: Rollouts) -> Rollouts:
    """The entries as trajectories of the prompts `group` of `like`."""
    lengths = torch.tensor([len(e.tokens) for e in stored])
    padded = torch.zeros(len(stored), like.constraints.max_length, dtype=torch.int64)
    is_action = torch.arange(padded.shape[1]) < lengths[:, None]
    for n, e in enumerate(stored):
        padded[n, : len(e.tokens)] = torch.tensor(e.tokens, dtype=torch.int64)
        if e.observed:
            is_action[n, list(e.observed)] = False
    return Rollouts(
        like.prompts,
        torch.tensor(group),
        padded,
        lengths,
        torch.tensor([math.nan if e.log_behavior is None else e.log_behavior for e in stored]),
        like.constraints,
        is_action=is_action if any(e.observed for e in stored) else None,
        has_grammar=like.has_grammar,
    )
