"""The loop: `Trainer.step` is the road, in order, and nothing else.

prompts -> sample -> pack -> score / log_reward -> modified_subtb_loss (or another) -> optimiser step

fastgfn.behavior holds the first, fastgfn.passes the three in the middle, for a whole tree or in parts, and
fastgfn.durable what of a run outlives the process.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastgfn import checks, durable, failures
from fastgfn.behavior import Explorer, drift
from fastgfn.config import TrainConfig
from fastgfn.log_z import LearnedLogZ
from fastgfn.models import Policy, condition
from fastgfn.objectives import REGISTRY, has_anchor
from fastgfn.packing import pack
from fastgfn.passes import Pass, add_gradients, estimate_log_z
from fastgfn.phases import phase
from fastgfn.rewards import ProductReward, Reward
from fastgfn.rollout import check_prompts
from fastgfn.types import Constraints, Grammar, Rollouts, as_int64

# Nats per token by which the sampler's log q may differ from the score's before merging is given up.
MOST_DRIFT = 0.1


class Trainer:
    """Fine-tune a policy to draw Z with probability proportional to R(Z)^(1/T).

    Args:
        policy: a Policy with trainable parameters; it is changed in place.
        prompts: token ids of every training prompt.
        reward: callable(TokenTree) -> un-tempered log R per node, see fastgfn.rewards.
        constraints: the sequence set.
        config: settings.
        grammar: which tokens may follow each sequence, as of `sample`; the same one where a run is resumed.
        demonstrations: (place of a prompt in `prompts`, token ids of a Z without the termination token). With
            replay they enter the buffer before step 0, with the R that they have; see also
            `demonstration_samples`.
        seed_prompts: for every prompt, or None for some, another that reveals the answer. What is drawn from
            it before step 0 (`seed_prompt_samples`) enters the buffer of the prompt itself.
        seed_constraints: the sequence set of these draws, within `constraints`: a shorter max_length, or
            further termination tokens to cut at. None: `constraints`.
        embed: callable(list of Z) -> (K, E) embeddings for the replay buffer, see `ReplayBuffer`.

    Raises:
        InputError: no prompts, a prompt or constraints that do not fit the model, no trainable parameters, a
            terminal-only reward for an objective of prefixes, a demonstration outside the constraints or the
            grammar, or demonstrations and seed prompts that the settings have no use for.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompts: Sequence[Sequence[int]],
        reward: Reward,
        constraints: Constraints,
        config: TrainConfig,
        grammar: Grammar | None = None,
        demonstrations: Sequence[tuple[int, Sequence[int]]] = (),
        seed_prompts: Sequence[Sequence[int] | None] | None = None,
        seed_constraints: Constraints | None = None,
        embed: Callable[[list[list[int]]], Tensor] | None = None,
    ) -> None:
        _check(policy, prompts, reward, constraints, config)
        if grammar is None:
            _check_log_z(constraints, config)
        _condition(policy, config)
        self.policy = policy
        policy.gradient_checkpointing = config.gradient_checkpointing
        self.prompts = [list(p) for p in prompts]
        self.reward = reward
        self.constraints = constraints
        self.config = config
        self.grammar = grammar
        self.log_z = LearnedLogZ(config.log_z, policy, len(prompts), seed=config.seed)
        self.optimizer = _optimizer([p for _, p in policy.parameters()], self.log_z, config)
        self.explorer = Explorer(
            policy,
            prompts=prompts,
            constraints=constraints,
            config=config,
            grammar=grammar,
            demonstrations=demonstrations,
            seed_prompts=seed_prompts,
            seed_constraints=seed_constraints,
            factors=reward.names if isinstance(reward, ProductReward) else ("log_reward",),
            embed=embed,
        )
        self.buffer = self.explorer.buffer
        self.steps_done = 0
        self.trajectories = 0
        self.tokens = 0
        self.seconds = 0.0
        self.merges = True  # whether sequences are drawn with merged weights
        self.run_folder: str | None = None  # whose checkpoints are this run's

    @failures.undone
    def step(self) -> dict[str, float]:
        """One optimiser step over `accumulation` micro-batches; returns metrics of the batch.

        A step that raises leaves the trainer as it was, without gradients: the next one draws what it would.

        Raises:
            NonFiniteError: a reward, loss or gradient is nan or inf; `trajectories` has those behind it.
            InputError: nothing to train on for a prompt, where num_samples is 0.
        """
        config, step = self.config, self.steps_done
        learning_rate = config.learning_rate_at(step)
        metrics = dict.fromkeys(("loss", "log_z", "drift"), 0.0)
        self.optimizer.zero_grad()
        batches = []
        for micro in range(config.accumulation):
            temperature = self.explorer.reward_temperature(step, micro)
            is_conditioned = config.conditioning is not None
            with self.policy.at_temperature(temperature) if is_conditioned else contextlib.nullcontext():
                batches.append(self._micro_batch(step, micro, temperature, metrics))
        self._check_drift(metrics["drift"])
        metrics["grad_norm"] = self._update(learning_rate, batches)
        self.steps_done += 1
        return metrics | {
            "learning_rate": learning_rate,
            "buffer": len(self.buffer),
            "trajectories": self.trajectories,
            "tokens": self.tokens,
        }

    def _micro_batch(
        self, step: int, micro: int, temperature: float, metrics: dict[str, float]
    ) -> tuple[Pass, Rollouts]:
        """Draw, pack and add gradients; the metrics take their share."""
        config = self.config
        reward = self.reward.at(step) if isinstance(self.reward, ProductReward) else self.reward
        target = dict(reward=reward, reward_temperature=temperature)
        metrics["reward_temperature"] = temperature
        if step == micro == 0:
            self._fill(reward)
        with failures.named(self.policy):
            drawn = self.explorer.draw(
                step, micro, first_trajectory=self.trajectories, merge=self.merges, **target
            )
        tree = pack(drawn.rollouts, grammar=self.grammar, device=self.policy.device)
        options = dict(objective=config.objective, max_tokens=config.max_tokens, **config.objective_options)
        options |= dict(policy=self.policy, **target)
        with failures.named(self.policy, drawn.rollouts):
            result = add_gradients(
                tree,
                log_z=self.log_z.of(
                    self.explorer.indices(step, micro), partial(estimate_log_z, tree, **options)
                ),
                normalization=config.normalization,
                log_behavior=drawn.rollouts.log_behavior,
                importance_clip=config.importance_clip,
                scale=1.0 / config.accumulation,
                **options,
            )
        if result.known_log_z is not None:
            self.log_z.check(result.known_log_z, result.log_z)
        failures.check_loss(result, drawn.rollouts, self.policy)
        self.explorer.remember(drawn, result.log_factors, step)
        self.trajectories += drawn.num_trajectories
        self.tokens += drawn.num_tokens
        found = {"loss": result.loss, "log_z": result.log_z.mean()}
        found["drift"] = drift(drawn.fresh, tree, result.log_pf)
        if result.known_log_z is not None:
            found["learned_log_z"] = result.known_log_z.mean()
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / config.accumulation
        return result, drawn.rollouts

    def fit(
        self,
        run_folder: Path,
        *,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Run to `config.steps`; checkpoints at the start, every `checkpoint_every` steps and at the end.

        `seconds` counts the wall time in here, evaluations and checkpoints included.

        `should_stop` is asked after every step; when it says yes a checkpoint is written and False returned.

        Raises:
            NonFiniteError: as `step`; failed_step.json in the folder has the trajectories.
            InputError: the folder holds checkpoints and this trainer neither wrote nor resumed them.
        """
        every = self.config.checkpoint_every
        started = time.perf_counter() - self.seconds
        if os.path.realpath(run_folder) != self.run_folder:
            self.save(run_folder)
        while self.steps_done < self.config.steps:
            try:
                metrics = self.step()
            except checks.NonFiniteError as error:
                self._write_failure(Path(run_folder), error)
                raise
            on_step(self.steps_done, metrics)
            self.seconds = time.perf_counter() - started
            stop = should_stop()
            if stop or self.steps_done == self.config.steps or (every and self.steps_done % every == 0):
                self.save(run_folder)
            if stop:
                return self.steps_done == self.config.steps
        return True

    def save(self, run_folder: Path) -> Path:
        """Write a checkpoint; see fastgfn.checkpoint.

        Raises:
            InputError: the folder holds checkpoints and this trainer neither wrote nor resumed them.
        """
        return durable.save(self, run_folder)

    def resume(self, run_folder: Path) -> int:
        """Continue from the newest intact checkpoint; returns the number of steps already done.

        A damaged checkpoint is passed over with a warning: training again to its step writes the same bits.

        Raises:
            InputError: no intact checkpoint, or it was written with other settings.
        """
        return durable.resume(self, run_folder)

    def _check_drift(self, drift: float) -> None:
        """Draw unmerged from now on if merged weights are too far from the policy."""
        if self.merges and drift > MOST_DRIFT:
            have = f"{drift:.2g} nats per token, more than {MOST_DRIFT}"
            warnings.warn(
                f"Trainer: merged weights drift by {have}; drawing with unmerged ones", stacklevel=4
            )
            self.merges = False

    def _fill(self, reward: Reward) -> None:
        """Demonstrations and what seed prompts yield go into the buffer."""
        with failures.named(self.policy):
            drawn, tokens = self.explorer.fill(
                reward=reward, first_trajectory=self.trajectories, merge=self.merges
            )
        self.trajectories += drawn
        self.tokens += tokens

    def _write_failure(self, folder: Path, error: checks.NonFiniteError) -> None:
        config, step = self.config, self.steps_done
        prompts = [self.explorer.prompts(step, micro) for micro in range(config.accumulation)]
        about = {"step": step, "seed": config.seed, "config": config.to_dict(), "prompts": prompts}
        failures.write(folder, error, **about)

    @phase("optimizer")
    def _update(self, learning_rate: float, batches: list[tuple[Pass, Rollouts]]) -> float:
        parameters = [p for _, p in self.policy.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        failures.check_norm(norm, batches, self.policy)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]
        self.optimizer.step()
        # a caller's autocast around several steps would keep casts of the weights before this one
        torch.clear_autocast_cache()
        return float(norm)


def _check(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    constraints: Constraints,
    config: TrainConfig,
) -> None:
    """Refuse what no step could work with; arguments as of `Trainer`."""
    checks.check(len(prompts) > 0, "Trainer", "prompts", "at least one prompt", 0, "pass lists of token ids")
    checks.check(
        not (REGISTRY[config.objective].reads_prefixes and getattr(reward, "terminal_only", False)),
        "Trainer",
        "reward",
        "defined on every terminable prefix",
        "a terminal-only reward",
        "SubTB needs prefix rewards; set objective='vargrad' (VarGrad) for terminal-only ones",
    )
    checks.check(
        bool(policy.parameters()), "Trainer", "policy", "trainable", "no parameters", "use load_policy"
    )
    check_prompts([as_int64(p) for p in prompts], policy, constraints)
    longest = max(map(len, prompts)) + constraints.max_length
    fits = config.max_tokens is None or config.max_tokens >= longest
    want = f">= {longest}, the longest prompt and max_length"
    checks.check(fits, "Trainer", "config.max_tokens", want, config.max_tokens, "raise it")


def _check_log_z(constraints: Constraints, config: TrainConfig) -> None:
    """That the anchor of an objective of prefixes has a log Z(X) of its own exactly where it is read."""
    if REGISTRY[config.objective].reads_log_z is not has_anchor:
        return
    estimated, field = config.log_z == "estimate", "config.log_z"
    if constraints.min_length == 0 or constraints.termination == "own":
        want, fix = "'estimate' where s_0 can stop", "the objective would not read it"
        checks.check(estimated, "Trainer", field, want, repr(config.log_z), fix)
        return
    # of a single sequence it is what that sequence says, so that nothing balances it with others
    enough, want = (
        not estimated or config.most_per_prompt >= 2,
        "learned where s_0 cannot stop and num_samples is 1",
    )
    checks.check(enough, "Trainer", field, want, repr(config.log_z), "or raise num_samples to 2")


def _optimizer(
    parameters: list[torch.nn.Parameter], log_z: LearnedLogZ, config: TrainConfig
) -> torch.optim.Adam:
    """Adam; the `share` of a group is its learning rate over the policy's."""
    groups = [dict(params=parameters, share=1.0)]
    if learned := [p for _, p in log_z.parameters()]:
        groups.append(dict(params=learned, share=config.log_z_learning_rate / config.learning_rate))
    return torch.optim.Adam(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


def _condition(policy: Policy, config: TrainConfig) -> None:
    """Condition the policy as the settings say, or find that it is."""
    has, fix = policy.conditioning, "train a conditioned adapter with the settings that it was made with"
    if has is None and config.conditioning is not None:
        condition(policy, config.conditioning, config.target_temperatures)
        return
    want = None if has is None else (has.kind, has.temperatures)
    have = None if config.conditioning is None else (config.conditioning, tuple(config.target_temperatures))
    what = "config.conditioning and .target_temperatures"
    checks.check(want == have, "Trainer", what, want, have, fix)
