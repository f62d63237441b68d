"""Training settings: one frozen dataclass, validated once, unknown keys refused."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from fastgfn import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of `Trainer`; every field has a unit or a range."""

    steps: int = 100
    """Optimiser steps."""
    prompts_per_step: int = 1
    """Prompts in one micro-batch."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one optimiser step."""
    num_samples: int = 20
    """Sequences drawn per prompt and micro-batch."""
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
    objective: str = "modified_subtb"
    """What is balanced: "modified_subtb" (every prefix, which needs a reward of its own) or "vargrad" (whole
    sequences of a prompt, two at least; a reward of whole sequences is enough)."""
    subtb_lambda: float = 1.0
    """Window weight lambda^(k-1) of "modified_subtb", in [0, 1]."""
    normalization: str = "group"
    """How windows (or sequences) are pooled: "group", "batch" or "trajectory"."""
    max_tokens: int | None = None
    """Most nodes of a token tree in one pass. A larger one is scored and differentiated in parts of whole
    sequences, with equal gradients and less memory; None: always one pass."""
    rollout_precision: str | None = None
    """Precision of the weights that sequences are drawn with: "bfloat16", "int8" (on a CPU), "float8_e4m3fn"
    (on a GPU), or None for the base's own. The loss does not see it; `drift` among the metrics says how far
    such a sampler is from the policy."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of every layer for the backward pass, which runs the layer again: equal
    gradients, less memory, one more forward."""
    reward_temperature: tuple[float, float] = (1.0, 1.0)
    """log R is divided by this: value at step 0 and value from reward_horizon on, linear between."""
    reward_horizon: int = 1
    """Optimiser steps over which the reward temperature moves."""
    learning_rate: float = 1e-3
    """Adam step size at its peak."""
    warmup_steps: int = 10
    """Optimiser steps of linear warm-up from 0."""
    schedule: str = "cosine"
    """After warm-up: "constant", "linear" or "cosine" decay to 0 at `steps`."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates. Early residuals are orders of magnitude larger than late ones: a second moment
    that remembers 1000 steps would keep late steps far below learning_rate."""
    max_grad_norm: float = math.inf
    """Gradient norm above this is scaled down to it."""
    checkpoint_every: int = 25
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Of sampling, behaviour mix, replay and prompt order."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, field.type)
        for field in (
            "steps",
            "prompts_per_step",
            "accumulation",
            "num_samples",
            "replay_capacity",
            "reward_horizon",
            "tempered_horizon",
        ):
            self._need(getattr(self, field) >= 1, field, ">= 1")
        self._need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", ">= 1 or None")
        for field in ("replay_samples", "warmup_steps", "checkpoint_every", "seed"):
            self._need(getattr(self, field) >= 0, field, ">= 0")
        known = ("modified_subtb", "vargrad")
        self._need(self.objective in known, "objective", "'modified_subtb' or 'vargrad'")
        pairs = self.objective != "vargrad" or self.num_samples + self.replay_samples >= 2
        self._need(pairs, "num_samples", ">= 2 with objective='vargrad'")
        self._need(0.0 <= self.subtb_lambda <= 1.0, "subtb_lambda", "in [0, 1]")
        self._pair("tempered_share", lambda v: 0.0 <= v <= 1.0, "two numbers in [0, 1]")
        self._pair("adam_betas", lambda v: 0.0 <= v < 1.0, "two numbers in [0, 1)")
        for field in ("temperature_range", "reward_temperature"):
            self._pair(field, lambda v: math.isfinite(v) and v > 0, "two numbers > 0")
        self._need(self.temperature_range[0] <= self.temperature_range[1], "temperature_range", "ascending")
        self._need(self.learning_rate > 0, "learning_rate", "> 0")
        self._need(self.max_grad_norm > 0, "max_grad_norm", "> 0")
        self._need(
            self.schedule in ("constant", "linear", "cosine"), "schedule", "constant, linear or cosine"
        )
        self._need(self.seed < 2**63, "seed", "below 2^63")
        self._need(0.0 <= self.replay_tolerance <= 1.0, "replay_tolerance", "in [0, 1]")
        self._need(self.replay_duplicates in ("near", "exact"), "replay_duplicates", "'near' or 'exact'")
        self._need(self.replay_priority in ("reward", "uniform"), "replay_priority", "'reward' or 'uniform'")
        known = ("bfloat16", "int8", "float8_e4m3fn")
        known_or_none = self.rollout_precision in (None, *known)
        self._need(known_or_none, "rollout_precision", f"one of {known} or None")
        names = ("group", "batch", "trajectory")
        self._need(self.normalization in names, "normalization", f"one of {names}")

    def _check_type(self, field: str, kind: type) -> None:
        value = getattr(self, field)
        if kind is int:
            self._need(type(value) is int, field, "an integer")
        elif kind is float:
            number = type(value) in (int, float) and not math.isnan(value)
            self._need(
                number and (math.isfinite(value) or field == "max_grad_norm"), field, "a finite number"
            )
        elif kind is str:
            self._need(type(value) is str, field, "text")
        elif kind is bool:
            self._need(type(value) is bool, field, "true or false")
        elif kind == str | None:
            self._need(value is None or type(value) is str, field, "text or None")
        elif kind == int | None:
            self._need(value is None or type(value) is int, field, "an integer or None")
        else:
            numbers = isinstance(value, tuple) and all(type(v) in (int, float) for v in value)
            self._need(numbers and len(value) == 2, field, "two numbers")

    def _pair(self, field: str, fits: Callable[[float], bool], want: str) -> None:
        value = getattr(self, field)
        self._need(all(map(fits, value)), field, want)

    def _need(self, ok: bool, field: str, want: str) -> None:
        checks.check(ok, "TrainConfig", field, want, repr(getattr(self, field)), "change this setting")

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Settings from a mapping (JSON, command line); an unknown key raises and names the closest one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                fix = f"did you mean {close[0]!r}?" if close else "see fastgfn.config.TrainConfig"
                checks.fail("TrainConfig", "every key", "a known setting", repr(key), fix)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def learning_rate_at(self, step: int) -> float:
        """Adam step size of optimiser step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.schedule]
        return self.learning_rate * factor

    def reward_temperature_at(self, step: int) -> float:
        return _between(self.reward_temperature, step / self.reward_horizon)

    def tempered_share_at(self, step: int) -> float:
        return _between(self.tempered_share, step / self.tempered_horizon)


def _between(ends: tuple[float, float], progress: float) -> float:
    start, end = ends
    return start + (end - start) * min(1.0, progress)
