"""`fastgfn train rng`: set up, train with a live exact KL, write the report."""

import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastgfn import checks
from fastgfn.checkpoint import check_run_folder, prepare_run_folder, read_run, write_json
from fastgfn.cli import report
from fastgfn.config import TrainConfig
from fastgfn.models import Policy, load_policy, save_adapter
from fastgfn.tasks.rng import RandomIntegers, random_integers
from fastgfn.train import Trainer

# Tuned on seeds 0-2 of the reference machine, see bench/NOTES.md; strings enter only by being sampled.
DEFAULTS = dict(
    steps=320,
    num_samples=96,
    tempered_share=(0.5, 0.0),
    tempered_horizon=120,
    temperature_range=(0.5, 2.0),
    replay_samples=101,
    replay_capacity=128,
    replay_duplicates="exact",
    replay_priority="reward",
    learning_rate=1e-3,
    adam_betas=(0.9, 0.95),
    max_grad_norm=0.5,
    warmup_steps=50,
    checkpoint_every=25,
)
EVALUATE_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class RngSettings:
    """Options of the task and the run; see `fastgfn train rng --help`."""

    output: Path
    model: str
    terminator: str
    prompt: str | None
    min_length: int
    max_length: int
    penalty: float
    lora_rank: int
    lora_dropout: float
    plots: bool


class RngRun:
    """One run: everything is validated before the run folder is touched."""

    def __init__(
        self, settings: RngSettings, overrides: dict, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        if settings.plots:
            report.require_plots()
        self.settings = settings
        same = os.path.isdir(settings.model) and os.path.realpath(settings.model) == os.path.realpath(
            settings.output
        )
        want = "another folder than --model"
        checks.check(not same, "train", "--output", want, str(settings.output), "choose a new folder")
        self.folder_mode = dict(resume=resume, overwrite=overwrite, events=settings.plots)
        check_run_folder(settings.output, **self.folder_mode)
        self.saved = read_run(settings.output) if resume else None
        base = DEFAULTS if self.saved is None else self.saved["train"]
        self.config = TrainConfig.from_dict(base | overrides)
        have, fix = self.config.conditioning, "leave it out: the task has one target"
        checks.check(have is None, "train", "conditioning", None, repr(have), fix)
        self.policy = load_policy(
            settings.model,
            lora_rank=settings.lora_rank,
            lora_dropout=settings.lora_dropout,
            seed=self.config.seed,
        )
        self.task = random_integers(
            self.policy,
            text=settings.prompt,
            terminator=settings.terminator,
            min_length=settings.min_length,
            max_length=settings.max_length,
            penalty=settings.penalty,
        )
        self.console = Console()
        self.stop = threading.Event()

    def run(self) -> bool:
        """Train and report; False if it was interrupted (a checkpoint is written)."""
        trainer = make_trainer(self.policy, self.task, self.config)
        before_log_q = self.task.log_probs(self.policy)
        before = self.task.evaluate(self.policy)
        if self.saved is not None:
            self._same_run(self.saved)
        folder = prepare_run_folder(self.settings.output, **self.folder_mode)
        if self.saved is not None:
            self.console.print(f"resumed at step {trainer.resume(folder)} of {self.config.steps}")
        else:
            write_json(folder / "run.json", self._describe())
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            finished = self._train(trainer, folder)
        finally:
            signal.signal(signal.SIGINT, previous)
        if not finished:
            self.console.print(
                f"interrupted at step {trainer.steps_done}; continue with --resume --output {folder}"
            )
            return False
        save_adapter(self.policy, folder)
        after_log_q, after = self.task.log_probs(self.policy), self.task.evaluate(self.policy)
        if self.settings.plots:
            report.histogram(folder / "histogram.png", before_log_q, after_log_q, self.task)
        summary = self._summary(trainer, before, after)
        write_json(folder / "report.json", summary)
        report.show(self.console, folder, summary, self.task)
        return True

    def _train(self, trainer: Trainer, folder: Path) -> bool:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3g}  {task.fields[rate]:.0f} tokens/s  KL {task.fields[kl]:.2e}"
            ),
        )
        writer = report.EventWriter(folder, trainer.steps_done) if self.settings.plots else None
        started, tokens = time.perf_counter(), trainer.tokens
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            bar = progress.add_task(
                "",
                total=self.config.steps,
                completed=trainer.steps_done,
                loss=float("nan"),
                rate=0.0,
                kl=float("nan"),
            )

            def on_step(step: int, metrics: dict[str, float]) -> None:
                metrics["tokens_per_s"] = (trainer.tokens - tokens) / (time.perf_counter() - started)
                fields = {"loss": metrics["loss"], "rate": metrics["tokens_per_s"]}
                if step % EVALUATE_EVERY == 0 or step == self.config.steps:
                    exact = self.task.evaluate(self.policy)
                    metrics |= exact
                    fields["kl"] = exact["kl_target_to_model"]
                if writer is not None:
                    writer.add(step, metrics)
                progress.update(bar, completed=step, **fields)

            try:
                return trainer.fit(folder, on_step=on_step, should_stop=self.stop.is_set)
            finally:
                if writer is not None:
                    writer.close()

    def _interrupt(self, *_) -> None:
        """The first Ctrl-C ends after the current step, with a checkpoint; the second at once."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()

    def _same_run(self, saved: dict) -> None:
        """Refuse to continue a run with another task, model or adapter than it was started with."""
        fix = "pass the options the run was started with"
        for key, value in self._describe().items():
            if key not in ("plots", "train"):
                checks.check(saved.get(key) == value, "resume", key, repr(saved.get(key)), repr(value), fix)

    def _describe(self) -> dict:
        settings = {k: v for k, v in asdict(self.settings).items() if k != "output"}
        if Path(self.settings.model).is_dir():
            settings["model"] = str(Path(self.settings.model).resolve())
        constraints = self.task.constraints
        return settings | {
            "prompt_ids": self.task.prompt,
            "termination_token_id": constraints.termination_token_id,
            "train": self.config.to_dict(),
        }

    def _summary(self, trainer: Trainer, before: dict, after: dict) -> dict:
        return {
            "before": before,
            "after": after,
            "seconds": round(trainer.seconds, 2),
            "trajectories": trainer.trajectories,
            "tokens": trainer.tokens,
            "steps": trainer.steps_done,
            "seed": self.config.seed,
            "target": {
                "integers": len(self.task.numbers),
                "penalty_nats_per_token": self.task.penalty,
                "invalid_mass": self.task.invalid_mass,
                "log_z": self.task.log_z,
            },
            "model": self.settings.model,
            "weights": report.weights_note(self.settings.model),
            "threads": torch.get_num_threads(),
            "versions": report.versions(),
        }


def make_trainer(policy: Policy, task: RandomIntegers, config: TrainConfig) -> Trainer:
    return Trainer(
        policy, prompts=[task.prompt], reward=task.reward, constraints=task.constraints, config=config
    )
