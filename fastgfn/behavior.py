"""Which trajectories a step trains on: the prompts, what is drawn for them, what is replayed, what is kept.

Every random choice has a generator of its own, keyed by (seed, stream, step, micro-batch), so there is no
state besides the buffer, and a resumed run makes the choices of an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from fastgfn.config import TrainConfig
from fastgfn.models import Policy
from fastgfn.replay import ReplayBuffer
from fastgfn.rollout import sample
from fastgfn.types import Constraints, Grammar, Rollouts

_TEMPERATURES, _REPLAY, _PROMPTS = range(3)


class Origin(IntEnum):
    """Where a trajectory of a batch comes from."""

    DRAWN = 0
    REPLAYED = 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """A micro-batch.

    rollouts: all of its trajectories, N, those of `fresh` first.
    origin: (N,) int64, see Origin.
    fresh: the ones drawn from the policy for it, with the sampler's log-probs.
    num_trajectories, num_tokens: drawn on the way, the terminations included.
    """

    rollouts: Rollouts
    origin: Tensor
    fresh: Rollouts
    num_trajectories: int
    num_tokens: int


class Explorer:
    """The behaviour policy of a run, see `fastgfn.config.Behavior`.

    Args: as `Trainer`, which has checked them.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompts: Sequence[Sequence[int]],
        constraints: Constraints,
        config: TrainConfig,
        grammar: Grammar | None = None,
    ) -> None:
        self.policy = policy
        self._prompts = [list(p) for p in prompts]
        self.constraints = constraints
        self.config = config
        self.grammar = grammar
        self.buffer = ReplayBuffer(
            config.replay_capacity,
            duplicates=config.replay_duplicates if config.replay_samples else "exact",
            tolerance=config.replay_tolerance,
            priority=config.replay_priority,
        )

    def draw(self, step: int, micro: int, *, first_trajectory: int = 0, merge: bool = True) -> Drawn:
        """The trajectories of micro-batch `micro` of optimiser step `step`.

        first_trajectory, merge: as of `sample`; the draws of the run are numbered through.
        """
        config = self.config
        fresh = sample(
            self.prompts(step, micro),
            policy=self.policy,
            constraints=self.constraints,
            num_samples=config.num_samples,
            temperature=self._temperatures(step, micro),
            grammar=self.grammar,
            seed=config.seed,
            first_trajectory=first_trajectory,
            merge=merge,
            precision=getattr(torch, config.rollout_precision or "", None) if merge else None,
        )
        parts = [(Origin.DRAWN, fresh), (Origin.REPLAYED, self._replayed(fresh, step, micro))]
        rollouts, origin = _together([(kind, part) for kind, part in parts if part is not None])
        return Drawn(rollouts, origin, fresh, fresh.num_trajectories, fresh.num_tokens)

    def remember(self, drawn: Drawn, log_reward: Tensor) -> None:
        """Store what is new in the batch with its un-tempered log R, (N,) of all of its trajectories."""
        if self.config.replay_samples:
            self.buffer.add(drawn.fresh, log_reward[: drawn.fresh.num_trajectories].cpu())

    def prompts(self, step: int, micro: int) -> list[list[int]]:
        """The next prompts of a stream that visits every prompt once per epoch, in a new order each time."""
        first = (step * self.config.accumulation + micro) * self.config.prompts_per_step
        chosen = []
        for index in range(first, first + self.config.prompts_per_step):
            epoch, place = divmod(index, len(self._prompts))
            chosen.append(self._prompts[self._rng(_PROMPTS, epoch).permutation(len(self._prompts))[place]])
        return chosen

    def _rng(self, stream: int, *index: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, stream, *index])

    def _temperatures(self, step: int, micro: int) -> Tensor:
        """(N,) sampling temperatures: the first `tempered_share` of each prompt's samples are tempered."""
        config = self.config
        shape = (config.prompts_per_step, config.num_samples)
        tempered = round(config.tempered_share_at(step) * config.num_samples)
        low, high = config.temperature_range
        values = torch.from_numpy(self._rng(_TEMPERATURES, step, micro).uniform(low, high, size=shape))
        values[:, tempered:] = 1.0
        return values.flatten()

    def _replayed(self, fresh: Rollouts, step: int, micro: int) -> Rollouts | None:
        if not self.config.replay_samples:
            return None
        return self.buffer.sample(fresh, self.config.replay_samples, self._rng(_REPLAY, step, micro))


def _together(parts: Sequence[tuple[Origin, Rollouts]]) -> tuple[Rollouts, Tensor]:
    """All rows, and where each comes from."""
    whole = parts[0][1]
    for _, part in parts[1:]:
        whole = whole.extended(part)
    sizes = torch.tensor([part.num_trajectories for _, part in parts])
    return whole, torch.tensor([int(kind) for kind, _ in parts]).repeat_interleave(sizes)
