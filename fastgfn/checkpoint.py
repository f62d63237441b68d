"""Durable training state: adapter in PEFT format, optimiser, buffer and counters; safetensors and JSON only.

A checkpoint folder is written under a temporary name, flushed to disk and renamed, so a kill at any moment
leaves either the old or the new one. All randomness is keyed by (seed, step, trajectory), so the counters in
state.json are the whole random state.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy, load_adapter_weights, save_adapter

KEEP = 2
RUN_FILES = ("run.json", "report.json", "histogram.png")


def prepare_run_folder(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Create a run folder, or refuse before anything in it changes.

    `overwrite` removes what an earlier run left; leftovers of killed writes are always removed.

    Raises:
        InputError: the folder cannot be written, holds a run although neither resume nor overwrite is set, or
            resume is set and it holds no checkpoint.
    """
    name, folder = "run folder", Path(folder)
    found = checkpoints(folder)
    if resume:
        want, fix = "a folder with a checkpoint", "start without --resume"
        checks.check(bool(found), name, "path", want, str(folder), fix)
    elif not overwrite:
        used = bool(found) or any((folder / f).exists() for f in ("run.json", "report.json"))
        checks.check(
            not used, name, "path", "new", str(folder), "pass --resume, --overwrite or another folder"
        )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            probe = place / f".write-{os.getpid()}"
            probe.touch()
            for leftover in place.glob(".*-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    except OSError as error:
        checks.fail(name, "path", "writable", f"{folder} ({error.strerror})", "choose another folder")
    if overwrite:
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "events", ignore_errors=True)
        for old in (*RUN_FILES, "adapter_config.json", "adapter_model.safetensors", "README.md"):
            (folder / old).unlink(missing_ok=True)
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write checkpoints/step-<state["step"]> if it is not there, and drop all but the newest two."""
    target = folder / "checkpoints" / f"step-{state['step']:08d}"
    if target in checkpoints(folder):
        return target
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_adapter(policy, partial)
    save_file(_optimizer_tensors(policy, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state))
    _flush(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(target.parent)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Restore the adapter and the optimiser in place; returns the saved state."""
    state = json.loads((path / "state.json").read_text())
    adapter, saved = load_file(path / "adapter_model.safetensors"), load_file(path / "optimizer.safetensors")
    load_adapter_weights(policy, adapter)
    index = {name: i for i, (name, _) in enumerate(policy.parameters())}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, field = key.rsplit(":", 1)
        moments.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def read_json(path: Path) -> dict:
    """A JSON object, or InputError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        checks.fail(
            "read_json", str(path), "a readable JSON file", type(error).__name__, "restore it or train again"
        )


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in policy.parameters()]
    return {
        f"{names[i]}:{field}": value.detach().clone().contiguous()
        for i, fields in state.items()
        for field, value in fields.items()
    }


def _flush(folder: Path) -> None:
    """fsync a folder and the files directly in it."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
