"""What of a Trainer outlives the process: its checkpoints, and how a run is told from another."""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from fastgfn import checks
from fastgfn.checkpoint import checkpoints, load_checkpoint, read_state, save_checkpoint
from fastgfn.config import TrainConfig
from fastgfn.rewards import ProductReward

if TYPE_CHECKING:
    from fastgfn.train import Trainer


def save(trainer: "Trainer", run_folder: Path) -> Path:
    """See `Trainer.save`."""
    folder = os.path.realpath(run_folder)
    free = folder == trainer.run_folder or not checkpoints(Path(folder))
    have, fix = f"{run_folder}, with checkpoints of another run", "choose another folder or resume"
    checks.check(free, "Trainer.save", "run_folder", "new, or this run's", have, fix)
    trainer.run_folder = folder
    state = {
        "step": trainer.steps_done,
        "trajectories": trainer.trajectories,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "merges": trainer.merges,
        "run": _describe(trainer),
        "buffer": trainer.buffer.state(),
    }
    return save_checkpoint(Path(folder), trainer.policy, trainer.optimizer, state, trainer.log_z.parameters())


def resume(trainer: "Trainer", run_folder: Path) -> int:
    """See `Trainer.resume`."""
    damaged: list[str] = []
    buffer = trainer.buffer.snapshot()
    for path in reversed(checkpoints(Path(run_folder))):
        try:
            state = read_state(path)
        except checks.InputError as error:
            damaged.append(f"{path.name}: {error}")
            continue
        _same_run(trainer, state)
        try:
            trainer.buffer.load_state(state["buffer"])
            load_checkpoint(path, trainer.policy, trainer.optimizer, trainer.log_z.parameters())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            trainer.buffer.restore(buffer)
            damaged.append(f"{path.name}: {error}")
            continue
        if damaged:
            warnings.warn(f"Trainer.resume: passed over damaged {'; '.join(damaged)}", stacklevel=3)
        trainer.steps_done, trainer.trajectories = state["step"], state["trajectories"]
        trainer.tokens, trainer.seconds = state["tokens"], state["seconds"]
        trainer.merges = state.get("merges", True)
        trainer.run_folder = os.path.realpath(run_folder)
        return trainer.steps_done
    have = f"{run_folder} ({'damaged ' + damaged[0] if damaged else 'no checkpoint'})"
    fix = "train in another folder" if damaged else "train first"
    checks.fail("Trainer.resume", "run_folder", "a run with an intact checkpoint", have, fix)


def _describe(trainer: "Trainer") -> dict:
    """What has to be the same for a run to be continued."""
    limits = trainer.constraints
    bias = None if limits.logit_bias is None else limits.logit_bias.double().tolist()
    text = json.dumps([trainer.prompts, bias])
    reward = trainer.reward
    schedules = reward.schedules if isinstance(reward, ProductReward) else None
    return trainer.config.to_dict() | {
        "termination_token_id": limits.termination_token_id,
        "extra_termination_token_ids": list(limits.extra_termination_token_ids),
        "min_length": limits.min_length,
        "max_length": limits.max_length,
        "termination": limits.termination,
        "demonstrations and seed prompts": trainer.explorer.given_hash,
        "grammar": None if trainer.grammar is None else type(trainer.grammar).__name__,
        "prompts and logit_bias": hashlib.sha256(text.encode()).hexdigest(),
        "reward factors": list(trainer.buffer.factors),
        "temperatures of the factors": schedules,
        "trainable tensors": [
            [name, list(p.shape)] for name, p in (*trainer.policy.parameters(), *trainer.log_z.parameters())
        ],
    }


def _same_run(trainer: "Trainer", state: dict) -> None:
    # a run from before a setting existed had what is now its default
    first = TrainConfig().to_dict() | {
        "extra_termination_token_ids": [],
        "demonstrations and seed prompts": None,
        "reward factors": ["log_reward"],
        "temperatures of the factors": None,
    }
    run = json.loads(json.dumps(first)) | state["run"]
    for key, value in json.loads(json.dumps(_describe(trainer))).items():
        saved = run.get(key)
        fix = "resume with the settings the run was started with"
        checks.check(saved == value, "Trainer.resume", key, _short(saved), _short(value), fix)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
