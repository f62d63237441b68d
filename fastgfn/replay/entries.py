"""What is stored of one trajectory, and how it is written down."""

import math
from dataclasses import dataclass

import torch

from fastgfn.types import Rollouts

Key = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored trajectory.

    tokens: Z, without the termination token.
    factors: K un-tempered log factors of R(Z); one, log R itself, where the reward is no product.
    observed: the places of the tokens that a tool returned.
    version: optimiser steps that the policy which drew it had done.
    log_behavior: log-density of the distribution that drew it, the stop included; None: unknown.
    order: how many trajectories had been given to the buffer before it.
    """

    tokens: tuple[int, ...]
    factors: tuple[float, ...]
    observed: tuple[int, ...] = ()
    version: int = 0
    log_behavior: float | None = None
    order: int = 0

    @property
    def key(self) -> Key:
        """Equal for duplicates: the same tokens, returned by a tool or chosen, are two trajectories."""
        return self.tokens, self.observed

    @property
    def log_reward(self) -> float:
        """Un-tempered log R."""
        return sum(self.factors[1:], self.factors[0])

    def row(self) -> list:
        """JSON-ready; floats survive exactly."""
        row = [list(self.factors), list(self.tokens), self.version, self.log_behavior, self.order]
        return [*row, list(self.observed)] if self.observed else row

    @classmethod
    def from_row(cls, row: list, order: int) -> "Entry":
        """Of `row`, or of the [log R, tokens, observed] that was written when nothing else was kept."""
        if not isinstance(row[0], list):
            value, tokens, *observed = row
            return cls(tuple(tokens), (value,), *map(tuple, observed), order=order)
        factors, tokens, version, log_behavior, order, *observed = row
        seen = tuple(observed[0]) if observed else ()
        return cls(tuple(tokens), tuple(factors), seen, version, log_behavior, order)


def entries_of(rollouts: Rollouts, factors: list[list[float]], version: int, first: int) -> list[Entry]:
    """An entry per trajectory; `first` is the order of the first one."""
    known = [value if math.isfinite(value) else None for value in rollouts.log_behavior.tolist()]
    rows = zip(rollouts.sequences(), factors, _observed(rollouts), known, strict=True)
    return [
        Entry(tuple(z), tuple(row), seen, version, density, first + n)
        for n, (z, row, seen, density) in enumerate(rows)
    ]


def _observed(rollouts: Rollouts) -> list[tuple[int, ...]]:
    """The places of each trajectory's tokens that a tool returned."""
    if rollouts.is_action is None:
        return [()] * rollouts.num_trajectories
    places = torch.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    return [tuple(row.nonzero()[:, 0].tolist()) for row in places & ~rollouts.is_action]
