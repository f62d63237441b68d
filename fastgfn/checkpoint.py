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
from fastgfn.models import Policy

KEEP = 2


def prepare_run_folder(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Create a run folder, or refuse before any work is done.

    Raises:
        InputError: the folder cannot be written, holds a run although neither resume nor overwrite is set, or
            resume is set and it holds no checkpoint.
    """
    name, folder = "run folder", Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        checks.fail(name, "path", "writable", f"{folder} ({error.strerror})", "choose another folder")
    found = checkpoints(folder)
    if resume:
        checks.check(
            bool(found), name, "path", "a folder with a checkpoint", str(folder), "start without --resume"
        )
    elif overwrite:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    else:
        used = bool(found) or (folder / "report.json").exists()
        checks.check(
            not used, name, "path", "new", str(folder), "pass --resume, --overwrite or another folder"
        )
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write checkpoints/step-<state["step"]> and drop all but the newest two."""
    target = folder / "checkpoints" / f"step-{state['step']:08d}"
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
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(policy.model, load_file(path / "adapter_model.safetensors"))
    saved = load_file(path / "optimizer.safetensors")
    index = {name: i for i, (name, _) in enumerate(policy.parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, field = key.rsplit(":", 1)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((path / "state.json").read_text())


def save_adapter(policy: Policy, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them."""
    policy.model.save_pretrained(folder, save_embedding_layers=False)


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
