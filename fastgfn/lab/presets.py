"""Settings of the laboratory: one default for every problem, and what each objective and behaviour changes.

A run has the settings DEFAULT | BY_MODEL[model of the problem] | the objective's | the behaviour's. They were
tuned on the frozen problems; steps and samples alone depend on the model. Every objective trains on as many
trajectories.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastgfn import checks

# What looks for modes, far from the policy, ends at EXPLORED of the steps: a small model spends capacity on
# strings that hardly count, and the last steps fit those that do.
EXPLORED = 0.6
DEFAULT: dict[str, Any] = dict(
    objective="modified_subtb",
    subtb_lambda=1.0,
    num_samples=80,
    tempered_share=(0.5, 0.0),
    temperature_range=(0.5, 4.0),
    epsilon=(0.5, 0.0),
    epsilon_share=0.25,
    replay_share=(0.5, 0.0),
    replay_capacity=512,
    replay_duplicates="exact",
    replay_priority="reward",
    learning_rate=2.5e-3,
    warmup_steps=20,
    schedule="cosine",
    adam_betas=(0.9, 0.99),
    max_grad_norm=1.0,
)
HORIZONS = ("tempered_horizon", "epsilon_horizon", "replay_horizon")
BY_MODEL: dict[str, dict[str, Any]] = {
    "tiny": dict(steps=800),
    "smollm2-135m": dict(steps=200, num_samples=48),
}
# The problems that the objectives are compared on; the behaviours on the first.
DENSE, SPARSE = "tiny-other", "tiny-sum"
# Objectives that every dense problem is trained with.
EVERYWHERE = (
    "modified_subtb",
    "modified_db",
    "subtb",
    "db",
    "tb_scalar",
    "vargrad",
    "rtb",
    "rooted_prefix_tb",
)
# A step on two cores, for the estimate that is printed before the first run.
SECONDS_PER_STEP = {"tiny": 0.05, "smollm2-135m": 1.5}


@dataclass(frozen=True)
class Preset:
    """settings: of fastgfn.config.TrainConfig. posterior: whether the fixed point is R's posterior: "yes",
    "no", or where. over_prior: the reward is R^(1/T) / p_base, so that the target is everyone's. updates:
    optimiser steps on the samples of one step of the others, so that trajectories are as many."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    posterior: str = "yes"
    over_prior: bool = False
    updates: int = 1


def _by_name(*presets: Preset) -> dict[str, Preset]:
    return {p.name: p for p in presets}


# Flows are learned from one another, so that residuals are large for long; of db each from the next alone.
FLOWS: dict[str, Any] = dict(log_z="head", learning_rate=5e-3, residual_loss="huber")
OBJECTIVES = _by_name(
    Preset("modified_subtb"),
    Preset("modified_subtb_0.9", dict(subtb_lambda=0.9)),
    Preset("modified_db", dict(objective="modified_db")),
    Preset("subtb", FLOWS | dict(objective="subtb")),
    Preset("db", FLOWS | dict(objective="db"), updates=2),
    Preset("tb_scalar", dict(objective="tb", log_z="scalar")),
    Preset("tb_head", dict(objective="tb", log_z="head")),
    Preset("vargrad", dict(objective="vargrad")),
    Preset("rtb", dict(objective="rtb", log_z="scalar"), over_prior=True),
    Preset("length_normalized_tb", dict(objective="length_normalized_tb"), posterior="no"),
    Preset("rooted_prefix_tb", dict(objective="rooted_prefix_tb"), posterior="where no reward is missing"),
    Preset(
        "interpolated_subtb", dict(objective="interpolated_subtb", interpolation_segment=2), posterior="no"
    ),
)
# None of these ever changes but the default, whose rollouts those of lower precision are.
ALONE = dict(num_samples=120, tempered_share=(0.0, 0.0), epsilon=(0.0, 0.0), replay_share=(0.0, 0.0))
BEHAVIORS = _by_name(
    Preset("default"),
    Preset("on_policy", ALONE),
    Preset("tempered", ALONE | dict(tempered_share=(1.0, 1.0), temperature_range=(0.5, 2.0))),
    Preset("replay_75", ALONE | dict(num_samples=30, replay_share=(0.75, 0.75))),
    Preset("epsilon", ALONE | dict(epsilon=(0.1, 0.1), epsilon_share=1.0)),
    Preset("local_search", ALONE | dict(num_samples=88, local_search_samples=(32, 32))),
    Preset("bf16_rollouts", dict(rollout_precision="bfloat16")),
    Preset("int8_rollouts", dict(rollout_precision="int8")),
)


def closest(function: str, arg: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, naming the closest one."""
    known = list(known)
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean {close[0]!r}?" if close else "see `fastgfn lab --list`"
    checks.fail(function, arg, f"one of {', '.join(known)}", repr(name), fix)


def settings(
    model: str, objective: str, behavior: str, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of a run of these names, with `overrides` over the presets'.

    Raises:
        InputError: an unknown name; the message has the closest known one.
    """
    closest("lab", "--objective", objective, OBJECTIVES)
    closest("lab", "--behavior", behavior, BEHAVIORS)
    found = DEFAULT | BY_MODEL[model] | OBJECTIVES[objective].settings | BEHAVIORS[behavior].settings
    updates = OBJECTIVES[objective].updates
    found["steps"] *= updates
    found["num_samples"] //= updates
    if "local_search_samples" in found:
        found["local_search_samples"] = tuple(num // updates for num in found["local_search_samples"])
    found |= overrides or {}
    steps = found["steps"]
    explored = max(1, round(EXPLORED * steps)) if isinstance(steps, int) else 1
    return {name: explored for name in HORIZONS} | found
