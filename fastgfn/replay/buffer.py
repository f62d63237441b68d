"""A per-prompt replay buffer: a lay-by between sampling and packing.

It stores token sequences with their un-tempered log R, so that a change of the reward temperature re-applies
on replay. Entries are kept in order of log R; the worst is evicted. Randomness comes from the caller.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.types import Rollouts


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One stored sequence; ordered by log R, ties by tokens, so that eviction is reproducible.

    observed: the places of the tokens that a tool returned.
    """

    log_reward: float
    tokens: tuple[int, ...]
    observed: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Equal for duplicates: the same tokens, returned by a tool or chosen, are two trajectories."""
        return self.tokens, self.observed


class ReplayBuffer:
    """Sequences per prompt, best rewards kept.

    Args:
        capacity: entries per prompt.
        duplicates: "near" (default) also rejects a sequence whose edit distance to a stored one is below
            tolerance * (sum of both lengths), unless it beats every such neighbour, which it then replaces;
            "exact" rejects equal sequences only. "near" needs rapidfuzz.
        tolerance: see above; 0.25 is the paper's.
        priority: how `sample` draws, without replacement: "reward" proportional to R, "uniform".
    """

    def __init__(
        self,
        capacity: int = 50,
        *,
        duplicates: str = "near",
        tolerance: float = 0.25,
        priority: str = "reward",
    ) -> None:
        name = "ReplayBuffer"
        checks.check(capacity >= 1, name, "capacity", ">= 1", capacity, "raise it, or train without replay")
        checks.check(
            duplicates in ("near", "exact"), name, "duplicates", "'near' or 'exact'", duplicates, "use 'near'"
        )
        checks.check(
            priority in ("reward", "uniform"),
            name,
            "priority",
            "'reward' or 'uniform'",
            priority,
            "use 'reward'",
        )
        if duplicates == "near":
            try:
                from rapidfuzz.distance import Levenshtein
            except ImportError:
                checks.missing_package(
                    name, "rapidfuzz", "run `pip install 'fastgfn[replay]'` or use duplicates='exact'"
                )
            self._distance = Levenshtein.distance
        self.capacity = capacity
        self.duplicates = duplicates
        self.tolerance = tolerance
        self.priority = priority
        self._entries: dict[tuple[int, ...], list[Entry]] = {}
        self._known: dict[tuple[int, ...], set[tuple]] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    def entries(self, prompt: Sequence[int]) -> list[Entry]:
        """Stored entries of a prompt, worst first."""
        return list(self._entries.get(tuple(prompt), ()))

    def add(self, rollouts: Rollouts, log_reward: Tensor) -> int:
        """Insert the trajectories with their un-tempered terminal log R, (N,); returns how many were new.
        What a tool returned stays marked as that.

        Raises:
            InputError: log_reward has another shape or a non-finite value.
        """
        want = (rollouts.num_trajectories,)
        checks.check_shape("ReplayBuffer.add", "log_reward", log_reward, want, "one value per trajectory")
        checks.check(
            bool(log_reward.isfinite().all()),
            "ReplayBuffer.add",
            "log_reward",
            "finite",
            "nan or inf",
            "clamp it",
        )
        keys = [tuple(p.tolist()) for p in rollouts.prompts]
        rows = zip(
            rollouts.group.tolist(),
            rollouts.sequences(),
            log_reward.tolist(),
            _observed(rollouts),
            strict=True,
        )
        return sum(self._insert(keys[g], Entry(value, tuple(z), seen)) for g, z, value, seen in rows)

    def _insert(self, prompt: tuple[int, ...], entry: Entry) -> bool:
        entries = self._entries.setdefault(prompt, [])
        known = self._known.setdefault(prompt, set())
        if entry.key in known:
            return False
        if len(entries) == self.capacity and entry < entries[0]:
            return False
        if self.duplicates == "near":
            near = [e for e in entries if self._is_near(e.tokens, entry.tokens)]
            if near and max(near) > entry:
                return False
            for e in near:
                self._remove(prompt, e)
        if len(entries) == self.capacity:
            self._remove(prompt, entries[0])
        bisect.insort(entries, entry)
        known.add(entry.key)
        return True

    def _remove(self, prompt: tuple[int, ...], entry: Entry) -> None:
        del self._entries[prompt][bisect.bisect_left(self._entries[prompt], entry)]
        self._known[prompt].discard(entry.key)

    def _is_near(self, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        cutoff = self.tolerance * (len(a) + len(b))
        return self._distance(a, b, score_cutoff=math.ceil(cutoff)) < cutoff

    def sample(self, rollouts: Rollouts, num_samples: int, rng: np.random.Generator) -> Rollouts | None:
        """Up to `num_samples` stored sequences for each prompt of `rollouts`, or None if nothing is stored.

        The result has the prompts and constraints of `rollouts`, and its grammar if it has one, which
        `pack` asks about them again; its log_behavior is NaN (unknown).
        """
        stored, group = [], []
        for g, prompt in enumerate(rollouts.prompts):
            entries = self._entries.get(tuple(prompt.tolist()), [])
            chosen = self._choose(entries, min(num_samples, len(entries)), rng)
            stored += [entries[i] for i in chosen]
            group += [g] * len(chosen)
        if not stored:
            return None
        lengths = torch.tensor([len(e.tokens) for e in stored])
        padded = torch.zeros(len(stored), rollouts.constraints.max_length, dtype=torch.int64)
        is_action = torch.arange(padded.shape[1]) < lengths[:, None]
        for n, e in enumerate(stored):
            padded[n, : len(e.tokens)] = torch.tensor(e.tokens, dtype=torch.int64)
            is_action[n, list(e.observed)] = False
        return Rollouts(
            rollouts.prompts,
            torch.tensor(group),
            padded,
            lengths,
            torch.full((len(stored),), math.nan),
            rollouts.constraints,
            is_action=is_action if any(e.observed for e in stored) else None,
            has_grammar=rollouts.has_grammar,
        )

    def _choose(self, entries: list[Entry], size: int, rng: np.random.Generator) -> list[int]:
        """Gumbel top-k: a draw without replacement, proportional to R or uniform."""
        if not size:
            return []
        score = rng.gumbel(size=len(entries))
        if self.priority == "reward":
            score = score + np.array([e.log_reward for e in entries])
        return np.sort(np.argsort(-score, kind="stable")[:size]).tolist()

    def state(self) -> dict:
        """JSON-ready contents; floats survive exactly."""
        rows = {
            ",".join(map(str, p)): [
                [e.log_reward, list(e.tokens), *([list(e.observed)] if e.observed else [])] for e in v
            ]
            for p, v in self._entries.items()
        }
        return {"entries": rows}

    def load_state(self, state: dict) -> None:
        self.restore(
            {
                tuple(map(int, prompt.split(","))): [Entry(value, *map(tuple, rest)) for value, *rest in rows]
                for prompt, rows in state["entries"].items()
            }
        )

    def snapshot(self) -> dict[tuple[int, ...], list[Entry]]:
        """The contents as they are now, for `restore`; what is stored later does not change it."""
        return {prompt: list(rows) for prompt, rows in self._entries.items()}

    def restore(self, entries: dict[tuple[int, ...], list[Entry]]) -> None:
        """Take over the contents of a `snapshot`."""
        self._entries = entries
        self._known = {p: {e.key for e in rows} for p, rows in self._entries.items()}


def _observed(rollouts: Rollouts) -> list[tuple[int, ...]]:
    """The places of each trajectory's tokens that a tool returned."""
    if rollouts.is_action is None:
        return [()] * rollouts.num_trajectories
    places = torch.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    return [tuple(row.nonzero()[:, 0].tolist()) for row in places & ~rollouts.is_action]
