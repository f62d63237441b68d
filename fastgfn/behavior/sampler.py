"""`sample` with the settings of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn.config import TrainConfig
from fastgfn.models import Policy
from fastgfn.rollout import SamplingOptions, sample
from fastgfn.types import Constraints, Grammar, Rollouts


@dataclass(slots=True)
class Sampler:
    """`sample` as the run has it; it numbers the trajectories and counts."""

    policy: Policy
    config: TrainConfig
    grammar: Grammar | None
    first_trajectory: int
    merge: bool
    num_trajectories: int = 0
    num_tokens: int = 0

    def __call__(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        num_samples: int,
        constraints: Constraints,
        *,
        temperature: float | Tensor = 1.0,
        options: SamplingOptions | None = None,
    ) -> Rollouts:
        drawn = sample(
            prompts,
            policy=self.policy,
            constraints=constraints,
            num_samples=num_samples,
            temperature=temperature,
            options=options,
            grammar=self.grammar,
            seed=self.config.seed,
            first_trajectory=self.first_trajectory + self.num_trajectories,
            merge=self.merge,
            precision=getattr(torch, self.config.rollout_precision or "", None) if self.merge else None,
        )
        given = sum(map(len, options.prefixes)) if options is not None and options.prefixes else 0
        self.num_trajectories += drawn.num_trajectories
        self.num_tokens += drawn.num_tokens - given
        return drawn
