"""Durable training state: adapter in PEFT format, what is learned beside it in a file of its own, optimiser,
buffer and counters; safetensors and JSON only.

A checkpoint folder is written under a temporary name, flushed to disk and renamed, so a kill at any moment
leaves the new one or the one before. All randomness is keyed by (seed, step, trajectory), so the counters in
state.json are the whole random state.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgfn import checks
from fastgfn.models import Policy, load_adapter_weights, save_adapter
from fastgfn.models.adapter import PARTIAL

KEEP = 2
LEARNED = "log_z.safetensors"
# What a run writes beside checkpoints/ and events/; run.json, which says that they are a run's, goes last.
RUN_FILES = ("report.json", "histogram.png", "failed_step.json", "adapter_config.json")
RUN_FILES += ("adapter_model.safetensors", "conditioning.json", "run.json")
RUN_KEYS = {
    "model": str,
    "prompt_ids": list,
    "termination_token_id": int,
    "max_length": int,
    "train": dict,
}
STATE_KEYS = {"step": int, "trajectories": int, "tokens": int, "seconds": float}
STATE_KEYS |= {"run": dict, "buffer": dict}


def check_run_folder(
    folder: Path, *, resume: bool = False, overwrite: bool = False, events: bool = False
) -> None:
    """Refuse a run folder before anything in it changes; `events` says that the run writes events/.

    Raises:
        InputError: resume and overwrite are both set, the folder cannot be looked into, has a folder where a
            file belongs or the other way round, holds a run although neither is set, no checkpoint to resume,
            or files to overwrite that no readable run.json shows to be a run's.
    """
    name, other = "run folder", "choose another folder"
    both = "both resume and overwrite"
    checks.check(not (resume and overwrite), name, "mode", "one of resume and overwrite", both, "drop one")
    with _refuse_os_errors(folder):
        found = checkpoints(folder)
        used = bool(found) or any((folder / f).exists() for f in RUN_FILES)
        for f in RUN_FILES:
            checks.check(not (folder / f).is_dir(), name, str(folder / f), "a file", "a folder", other)
        logs = folder / "events"
        taken = events and logs.exists() and not logs.is_dir()
        checks.check(not taken, name, str(logs), "a folder", "a file", f"move it, pass --no-plots or {other}")
    if resume:
        want = "a folder with a checkpoint"
        checks.check(bool(found), name, "path", want, str(folder), "start without --resume")
    elif overwrite and used:
        want, have = "new or hold a run.json, which shows that a run wrote it", f"{folder} without one"
        checks.check((folder / "run.json").exists(), name, "path", want, have, other)
        read_run(folder)
    else:
        fix = "pass --resume, --overwrite or another folder"
        checks.check(not used, name, "path", "new", str(folder), fix)


def prepare_run_folder(
    folder: str | Path, *, resume: bool = False, overwrite: bool = False, events: bool = False
) -> Path:
    """Create a run folder, or refuse before anything in it is removed; see `check_run_folder`.

    `overwrite` removes what an earlier run wrote; leftovers of killed writes are always removed. Nothing else
    in the folder is touched.
    """
    folder = Path(folder)
    check_run_folder(folder, resume=resume, overwrite=overwrite, events=events)
    places = [folder / "checkpoints", folder] + ([folder / "events"] if events else [])
    with _refuse_os_errors(folder):
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{PARTIAL}probe").touch()
        old = [leftover for place in places for leftover in place.glob(f"{PARTIAL}*")]
        if overwrite:
            old += checkpoints(folder)
            old += (folder / "events").glob("events.out.tfevents.*")
            old += [folder / f for f in RUN_FILES if (folder / f).exists()]
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@contextlib.contextmanager
def _refuse_os_errors(folder: Path):
    try:
        yield
    except OSError as error:
        have = f"{error.filename or folder} ({error.strerror})"
        checks.fail("run folder", "path", "writable", have, "choose another folder")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict,
    learned: Sequence[tuple[str, nn.Parameter]] = (),
) -> Path:
    """Write checkpoints/step-<state["step"]>, in place of one that is there, and keep it and the one before.

    learned: what the optimiser has after the policy's parameters, by name.

    An old folder of this step gives way under a name that `checkpoints` still lists and goes last.
    """
    target = folder / "checkpoints" / f"step-{state['step']:08d}"
    partial, aside = target.with_name(f"{PARTIAL}{target.name}"), target.with_name(f"{target.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_adapter(policy, partial)
    if learned:
        save_file({name: p.detach().contiguous() for name, p in learned}, partial / LEARNED)
    names = [name for name, _ in (*policy.parameters(), *learned)]
    save_file(_optimizer_tensors(names, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state))
    _flush(partial)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    partial.rename(target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    found = checkpoints(folder)
    kept = found[: found.index(target) + 1][-KEEP:]
    for old in found:
        if old not in kept:
            shutil.rmtree(old)
    return target


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint, or InputError."""
    return read_json(path / "state.json", STATE_KEYS)


def load_checkpoint(
    path: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    learned: Sequence[tuple[str, nn.Parameter]] = (),
) -> None:
    """Restore the adapter, `learned` and the optimiser in place; a damaged file raises before any changes."""
    adapter, saved = load_file(path / "adapter_model.safetensors"), load_file(path / "optimizer.safetensors")
    values = load_file(path / LEARNED) if learned else {}
    for name, p in learned:
        want, fix = tuple(p.shape), "restore it, or start another run"
        checks.check(name in values, "load_checkpoint", LEARNED, f"of {name}", f"{sorted(values)} alone", fix)
        checks.check_shape("load_checkpoint", f"{name} in {LEARNED}", values[name], want, fix)
    index = {name: i for i, (name, _) in enumerate((*policy.parameters(), *learned))}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, field = key.rsplit(":", 1)
        moments.setdefault(index[name], {})[field] = value
    load_adapter_weights(policy, adapter)
    with torch.no_grad():
        for name, p in learned:
            p.copy_(values[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def read_json(path: Path, keys: Mapping[str, type] = {}) -> dict:
    """A JSON object whose `keys` are there and of these types, or InputError."""
    fix = "restore it or choose another folder"
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        checks.fail("read_json", str(path), "a readable JSON file", type(error).__name__, fix)
    kind = type(value).__name__
    checks.check(isinstance(value, dict), "read_json", str(path), "a JSON object", kind, fix)
    for key, want in keys.items():
        have = repr(value[key])[:80] if key in value else "nothing"
        ok = type(value.get(key)) is want
        checks.check(ok, "read_json", f"{key} in {path}", f"of type {want.__name__}", have, fix)
    return value


def read_run(folder: Path) -> dict:
    """The run.json of a run folder, or InputError."""
    path = folder / "run.json"
    run = read_json(path, RUN_KEYS)
    ok = all(type(token) is int for token in run["prompt_ids"])
    fix = "restore it or choose another folder"
    checks.check(ok, "read_run", f"prompt_ids in {path}", "token ids", repr(run["prompt_ids"])[:80], fix)
    return run


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _optimizer_tensors(names: Sequence[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
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
