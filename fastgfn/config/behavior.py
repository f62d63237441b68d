"""What a step trains on: fresh draws, replay, local search, demonstrations."""

import math
from dataclasses import dataclass, fields

from fastgfn.config.settings import Settings, between

PRECISIONS = ("bfloat16", "int8", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Behavior(Settings):
    """The behaviour policy of a `Trainer`: which trajectories a step trains on.

    None of it moves the solution: where the loss is 0 on all sequences, it is 0 on whichever are looked at,
    as long as every one of them is drawn now and then. At finite capacity it says where the fit is good.
    A pair (start, end) is a schedule: start at step 0, end from its horizon on (optimiser steps), linear
    between; counts are rounded.
    """

    prompts_per_step: int = 1
    """Prompts in one micro-batch."""
    num_samples: int = 20
    """Sequences drawn per prompt and micro-batch. 0 draws none: replay or demonstrations are all there is."""
    tempered_share: tuple[float, float] = (0.5, 0.5)
    """Share of the drawn sequences whose temperature is uniform in temperature_range, the rest use 1: value
    at step 0 and value from tempered_horizon on, linear between."""
    tempered_horizon: int = 1
    """Optimiser steps over which the tempered share moves."""
    temperature_range: tuple[float, float] = (0.5, 2.0)
    """Sampling temperatures of the tempered share."""
    replay_samples: int = 0
    """Buffer entries added to each prompt's drawn sequences; 0 trains without a buffer."""
    replay_capacity: int = 50
    """Buffer entries kept per prompt."""
    replay_duplicates: str = "near"
    """What the buffer rejects: "near" (edit distance) or "exact" duplicates."""
    replay_tolerance: float = 0.25
    """Edit distance below this share of both lengths makes a near-duplicate."""
    replay_priority: str = "reward"
    """Buffer draws are proportional to "reward", or "uniform"."""
    rollout_precision: str | None = None
    """Precision of the weights that sequences are drawn with: "bfloat16", "int8" (on a CPU), "float8_e4m3fn"
    (on a GPU), or None for the base's own. The loss does not see it; `drift` among the metrics says how far
    such a sampler is from the policy."""
    seed: int = 0
    """Of sampling, behaviour mix, replay and prompt order."""

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, field.type)
        for field in ("prompts_per_step", "num_samples", "replay_capacity", "tempered_horizon"):
            self._need(getattr(self, field) >= 1, field, ">= 1")
        for field in ("replay_samples", "seed"):
            self._need(getattr(self, field) >= 0, field, ">= 0")
        self._need(self.seed < 2**63, "seed", "below 2^63")
        self._pair("tempered_share", lambda v: 0.0 <= v <= 1.0, "two numbers in [0, 1]")
        self._pair("temperature_range", lambda v: math.isfinite(v) and v > 0, "two numbers > 0")
        self._need(self.temperature_range[0] <= self.temperature_range[1], "temperature_range", "ascending")
        self._need(0.0 <= self.replay_tolerance <= 1.0, "replay_tolerance", "in [0, 1]")
        self._need(self.replay_duplicates in ("near", "exact"), "replay_duplicates", "'near' or 'exact'")
        self._need(self.replay_priority in ("reward", "uniform"), "replay_priority", "'reward' or 'uniform'")
        known_or_none = self.rollout_precision in (None, *PRECISIONS)
        self._need(known_or_none, "rollout_precision", f"one of {PRECISIONS} or None")

    def tempered_share_at(self, step: int) -> float:
        return between(self.tempered_share, step / self.tempered_horizon)
