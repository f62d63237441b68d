"""All settings of a run in one frozen dataclass with flat names."""

import math
from dataclasses import dataclass

from fastgfn.config.objective import Objective
from fastgfn.config.settings import between


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Objective):
    """Settings of `Trainer`: behaviour, objective and optimiser; every field has a unit or a range."""

    steps: int = 100
    """Optimiser steps."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one optimiser step."""
    max_tokens: int | None = None
    """Most nodes of a token tree in one pass. A larger one is scored and differentiated in parts of whole
    sequences, with equal gradients and less memory; None: always one pass."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of every layer for the backward pass, which runs the layer again: equal
    gradients, less memory, one more forward."""
    reward_temperature: tuple[float, float] = (1.0, 1.0)
    """log R is divided by this: value at step 0 and value from reward_horizon on, linear between."""
    reward_horizon: int = 1
    """Optimiser steps over which the reward temperature moves."""
    conditioning: str | None = None
    """One sampler for every target R^(1/T) with T in target_temperatures, chosen when it samples:
    "split_scale" for any reward, "adapter_scale" for powers of the base's own q, see
    fastgfn.models.temperature. None: one sampler for one temperature, reward_temperature."""
    target_temperatures: tuple[float, float] = (0.4, 1.2)
    """Range of T with a conditioning, which draws one for every micro-batch, uniformly (the flat targets of
    high ones take longest to fit), in the place of reward_temperature."""
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

    def __post_init__(self) -> None:
        Objective.__post_init__(self)
        for field in ("steps", "accumulation", "reward_horizon"):
            self._need(getattr(self, field) >= 1, field, ">= 1")
        self._need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", ">= 1 or None")
        for field in ("warmup_steps", "checkpoint_every"):
            self._need(getattr(self, field) >= 0, field, ">= 0")
        self._check_conditioning()
        self._pair("adam_betas", lambda v: 0.0 <= v < 1.0, "two numbers in [0, 1)")
        self._pair("reward_temperature", lambda v: math.isfinite(v) and v > 0, "two numbers > 0")
        self._need(self.learning_rate > 0, "learning_rate", "> 0")
        self._need(self.max_grad_norm > 0, "max_grad_norm", "> 0")
        self._need(
            self.schedule in ("constant", "linear", "cosine"), "schedule", "constant, linear or cosine"
        )

    def _check_conditioning(self) -> None:
        kinds = (None, "adapter_scale", "split_scale")
        self._need(self.conditioning in kinds, "conditioning", f"one of {kinds}")
        self._pair("target_temperatures", lambda v: math.isfinite(v) and v > 0, "two numbers > 0")
        low, high = self.target_temperatures
        self._need(low < high, "target_temperatures", "ascending")
        alone = self.conditioning is None or tuple(self.reward_temperature) == (1.0, 1.0)
        self._need(alone, "reward_temperature", "(1.0, 1.0) with a conditioning, which draws its own")
        fits = self.conditioning is None or self.log_z in ("estimate", "head")
        self._need(fits, "log_z", "'estimate' or 'head' with a conditioning, as log Z depends on T")

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
        return between(self.reward_temperature, step / self.reward_horizon)
