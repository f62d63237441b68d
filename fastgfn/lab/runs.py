"""One training run on one problem, measured exactly as it goes."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.config import TrainConfig
from fastgfn.lab import presets
from fastgfn.lab.posterior import log_probs
from fastgfn.lab.problems import NAMES, Problem, load_problem
from fastgfn.lab.provenance import provenance
from fastgfn.models import BUNDLED
from fastgfn.ops.scan import tree_cumsum
from fastgfn.rewards import Reward
from fastgfn.scoring import score
from fastgfn.train import Trainer
from fastgfn.types import TokenTree

THRESHOLD = 0.05
# Exact evaluations of a run, and the share of the nodes that training forwards which all of them may add.
EVALUATIONS, EVALUATED_SHARE = 40, 0.2


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run reached. Every metric is exact, of the worst prompt.

    strings: of all prompts. settings: of TrainConfig, whole. overrides: what is no preset's, and stop_at.
    curve: metrics of `Problem.evaluate` by "step" and "seconds", the first before training. `seconds` count
        training alone; `evaluation_seconds` are apart.
    log_z_learned: log Z(X) as learned or else as the last step estimates it; mean over that step's prompts.
    error: why the run broke off, or empty; the curve then ends before the step that failed.
    log_q: (strings,) float64, the trained sampler's, by prompt and string.
    """

    problem: str
    kind: str
    model: str
    weights: str
    strings: int
    reward_temperature: float
    objective: str
    behavior: str
    posterior: str
    seed: int
    settings: dict[str, Any]
    overrides: dict[str, Any]
    curve: list[dict[str, float]]
    steps: int
    seconds: float
    evaluation_seconds: float
    trajectories: int
    tokens: int
    log_z_learned: float
    error: str
    provenance: dict[str, str | int]
    log_q: list[list[float]]

    @property
    def start(self) -> dict[str, float]:
        return self.curve[0]

    @property
    def end(self) -> dict[str, float]:
        return self.curve[-1]

    @property
    def best(self) -> dict[str, float]:
        return min(self.curve, key=lambda point: point["tv"])

    def seconds_to(self, tv: float = THRESHOLD) -> float | None:
        """Training seconds until the first evaluation from which on TV stays at most `tv`; None: never."""
        return seconds_to(self.curve, tv)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def seconds_to(curve: list[dict[str, float]], tv: float) -> float | None:
    """See `Result.seconds_to`."""
    reached = None
    for point in curve:
        if not point["tv"] <= tv:
            reached = None
        elif reached is None:
            reached = point["seconds"]
    return reached


def tv_between(a: Result, b: Result) -> float:
    """Exact total-variation distance between the samplers of two runs on one problem, worst prompt."""
    pairs = zip(a.log_q, b.log_q, strict=True)
    return max(_tv(torch.tensor(x).double().exp(), torch.tensor(y).double().exp()) for x, y in pairs)


def _tv(p: Tensor, q: Tensor) -> float:
    # what is on no string is one more cell
    rest = float(p.sum() - q.sum())
    return 0.5 * (float((p - q).abs().sum()) + abs(rest))


def run(
    problem: str | Problem,
    *,
    objective: str = "modified_subtb",
    behavior: str = "default",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    stop_at: float | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, tv: None,
) -> Result:
    """Train on a problem and evaluate exactly at a fixed schedule of steps.

    Args:
        problem: a name of the frozen list, or one of your own.
        objective, behavior: names of fastgfn.lab.presets.
        seed: of the adapter, the draws and replay.
        overrides: settings of TrainConfig over the presets'.
        stop_at: end at the first evaluation of at most this TV; None: every run has its whole budget.
        on_step: called with (steps done, steps, TV of the last evaluation).

    Raises:
        InputError: an unknown name, or settings that contradict one another. What goes wrong in training
            itself is the result's `error`.
    """
    overrides = dict(overrides or {})
    if isinstance(problem, str):
        presets.closest("lab", "--problem", problem, NAMES)
        problem = load_problem(problem, seed=seed)
    config = make_config(problem, objective, behavior, seed, overrides)
    trainer = make_trainer(problem, config, over_prior=presets.OBJECTIVES[objective].over_prior)
    curve, seconds, evaluation, learned, error = _train(trainer, problem, stop_at, on_step)
    return Result(
        problem=problem.name,
        kind=problem.kind,
        model=problem.model,
        weights=weights_note(problem.model),
        strings=sum(len(p.sequences) for p in problem.posteriors),
        reward_temperature=problem.reward_temperature,
        objective=objective,
        behavior=behavior,
        posterior=presets.OBJECTIVES[objective].posterior,
        seed=seed,
        settings=config.to_dict(),
        overrides=overrides | given_stop(stop_at),
        curve=curve,
        steps=trainer.steps_done,
        seconds=seconds,
        evaluation_seconds=evaluation,
        trajectories=trainer.trajectories,
        tokens=trainer.tokens,
        log_z_learned=learned,
        error=error,
        provenance=provenance(),
        log_q=[log_probs(p, problem.policy).tolist() for p in problem.posteriors],
    )


def given_stop(stop_at: float | None) -> dict[str, float]:
    """What a result's overrides say of `stop_at`."""
    return {} if stop_at is None else {"stop_at": stop_at}


def make_config(
    problem: Problem, objective: str, behavior: str, seed: int, overrides: dict[str, Any]
) -> TrainConfig:
    """Settings of a run: the presets', what they take from the problem, and `overrides`."""
    temperature = target_temperature(objective, problem.reward_temperature)
    check_overrides(overrides, objective, temperature)
    given = {"reward_temperature": (temperature, temperature)}
    given |= presets.settings(problem.model, objective, behavior, overrides) | {"seed": seed}
    if given["objective"] == "rooted_prefix_tb" and problem.kind == "sparse":
        # what every string without a reward has
        lowest = min(float(posterior.log_reward.min()) for posterior in problem.posteriors)
        given.setdefault("rooted_missing_reward", lowest)
    return TrainConfig.from_dict(given)


def target_temperature(objective: str, reward_temperature: float) -> float:
    """T of the reward that an objective is given."""
    return 1.0 if presets.OBJECTIVES[objective].over_prior else reward_temperature


def check_overrides(overrides: dict[str, Any], objective: str, temperature: float) -> None:
    """Refuse settings that would train for another target than what is measured against, or that a result
    would not be named after."""
    for key, fix in (("seed", "use --seeds"), ("objective", "use --objective"), ("conditioning", "drop it")):
        have = overrides.get(key)
        checks.check(have is None, "lab", f"--set {key}", "omitted", repr(have), fix)
    ends = overrides.get("reward_temperature")
    if isinstance(ends, list | tuple) and len(ends) == 2:
        want, fix = f"[T, {temperature}]", "let the schedule end there"
        checks.check(ends[1] == temperature, "lab", "--set reward_temperature", want, ends, fix)
    if presets.OBJECTIVES[objective].over_prior:
        beta = overrides.get("rtb_beta", 1.0)
        checks.check(beta == 1.0, "lab", "--set rtb_beta", f"1.0 with {objective}", beta, "drop it")


def make_trainer(problem: Problem, config: TrainConfig, *, over_prior: bool = False) -> Trainer:
    """A trainer of the problem's sampler. over_prior: the reward is R^(1/T) / p_base, see `OverPrior`."""
    reward = problem.reward
    if over_prior:
        reward = OverPrior(reward, problem.reward_temperature, problem.policy.reference)
    return Trainer(
        problem.policy,
        prompts=problem.prompts,
        reward=reward,
        constraints=problem.constraints,
        config=config,
        grammar=problem.grammar,
    )


class OverPrior:
    """log R / T - log p_base(Z) under the run's own limits: a relative balance against p_base with beta = 1
    then has R^(1/T) as its target, as the other objectives do."""

    terminal_only = False

    def __init__(self, reward: Reward, reward_temperature: float, reference) -> None:
        self.reward = reward
        self.reward_temperature = reward_temperature
        self.reference = reference

    @torch.no_grad()
    def __call__(self, tree: TokenTree) -> Tensor:
        prior = score(tree, policy=self.reference)
        log_prior = tree_cumsum(prior.log_pf.double(), tree.parent) + prior.log_pterm
        return self.reward(tree).double() / self.reward_temperature - log_prior


def evaluate_every(problem: Problem, config: TrainConfig) -> int:
    """Steps between evaluations: EVALUATIONS of them, fewer where forwarding all strings would take more than
    EVALUATED_SHARE of what training forwards."""
    nodes = sum(p.tree.num_nodes for p in problem.posteriors)
    # score, its backward as two, and the reward; drawing is about one more
    trained = 5 * config.prompts_per_step * config.accumulation
    trained *= (config.num_samples + config.replay_samples) * max(1, problem.constraints.max_length // 2)
    return max(1, config.steps // EVALUATIONS, round(nodes / (EVALUATED_SHARE * trained)))


def _train(
    trainer: Trainer, problem: Problem, stop_at: float | None, on_step: Callable[[int, int, float], None]
) -> tuple[list[dict[str, float]], float, float, float, str]:
    """The curve, training seconds, evaluation seconds, log Z of the last step, and the error or ""."""
    config, curve, seconds, evaluation, metrics = trainer.config, [], 0.0, 0.0, {}
    every = evaluate_every(problem, config)

    def evaluate() -> dict[str, float]:
        nonlocal evaluation
        started = time.perf_counter()
        curve.append({"step": trainer.steps_done, "seconds": seconds} | problem.evaluate())
        evaluation += time.perf_counter() - started
        return curve[-1]

    evaluate()
    error = ""
    while trainer.steps_done < config.steps:
        started = time.perf_counter()
        try:
            metrics = trainer.step()
        except (*checks.USER_ERRORS, FloatingPointError) as failure:
            if trainer.steps_done == 0:
                raise
            error = " ".join(str(failure).split())
        seconds += time.perf_counter() - started
        due = bool(error) or trainer.steps_done in (config.steps, trainer.steps_done // every * every)
        if due and curve[-1]["step"] < trainer.steps_done:
            evaluate()
        on_step(trainer.steps_done, config.steps, curve[-1]["tv"])
        if error or (stop_at is not None and curve[-1]["tv"] <= stop_at):
            break
    return curve, seconds, evaluation, metrics.get("learned_log_z", metrics.get("log_z", float("nan"))), error


def weights_note(model: str) -> str:
    return "4-bit Q4_1 weights dequantised to float32" if model == BUNDLED else "random"
