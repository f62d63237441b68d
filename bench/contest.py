"""Providers against each other: prepared and checked one by one, timed in turns, a row each whatever happens.

`serve` is the main function of the two files that measure goals.
"""

import argparse
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import goals
import harness
import suite
import torch

from fastgfn.models import Policy
from fastgfn.phases import peak_bytes, reset_peak

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)


@dataclass(slots=True)
class Entry:
    """A provider that is ready to run.

    run(i): one round, the items that it made (tokens, samples, ...).
    error(): how far off it is, after a run; None: nothing to compare. It must not exceed `tolerance`.
    """

    run: Callable[[int], float]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    note: str = ""


@dataclass(slots=True)
class Contestant:
    """What is known of a provider: its times in ms and its items by round, its errors and memory."""

    status: str = "ok"
    note: str = ""
    ms: list[float] = field(default_factory=list)
    items: list[float] = field(default_factory=list)
    error: float | str = ""
    baseline: int | str = ""
    peak: int | str = ""

    @property
    def is_timed(self) -> bool:
        return self.status == "ok" and bool(self.ms)

    @property
    def speed(self) -> float:
        """Items per second, the median of the rounds."""
        return statistics.median(1e3 * n / ms for n, ms in zip(self.items, self.ms, strict=True))


def status_of(error: BaseException) -> str:
    """The status of a provider that raised."""
    if isinstance(error, suite.NotAvailable | ImportError):
        return f"not available: {suite.one_line(error)}"
    if isinstance(error, MEMORY_ERRORS) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"failed: {type(error).__name__}: {suite.one_line(error)}"


def free_memory() -> None:
    """Give back what an error or a provider that is gone held."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # The context is broken: every later provider says so itself.
            print(f"free_memory: {suite.one_line(error)}", flush=True)


def contest(
    providers: dict[str, Callable[[], Entry]],
    *,
    rounds: int,
    device: torch.device,
    seconds: Callable[[], float] = lambda: float("inf"),
) -> dict[str, Contestant]:
    """Every provider by name: prepared, run once and checked, run again for its memory, then timed in turns.

    One that raises or is wrong is not timed; the others are. `seconds` says how many are left: without any,
    no further provider is prepared and no round begins but the first.
    """
    found = {name: Contestant() for name in providers}
    ready: dict[str, Callable[[int], float]] = {}
    for name, make in providers.items():
        entrant = found[name]
        if seconds() <= 0 and ready:
            entrant.status = "skipped: no time left"
            continue
        try:
            ready[name] = _prepare(make, entrant, device)
        except Exception as error:
            entrant.status = status_of(error)
        if entrant.status != "ok":
            print(f"  {name}: {entrant.status}", flush=True)
            ready.pop(name, None)
            free_memory()
    for i in range(rounds):
        if i and seconds() <= 0:
            break
        gc.collect()
        for name in harness.rotated(list(ready), i):
            try:
                ms, items = timed(ready[name], i + 2)
                found[name].ms.append(ms)
                found[name].items.append(items)
            except Exception as error:
                found[name].status = status_of(error)
            if found[name].status != "ok":
                print(f"  {name}: {found[name].status}", flush=True)
                del ready[name]
                free_memory()
    return found


def _prepare(make: Callable[[], Entry], entrant: Contestant, device: torch.device) -> Callable[[int], float]:
    reset_peak(device)
    entrant.baseline = peak_bytes(device)
    entry = make()
    entry.run(0)
    if entry.error is not None:
        entrant.error = float(f"{entry.error():.3g}")
        if not entrant.error <= entry.tolerance:
            entrant.status = f"wrong: off by {entrant.error:.2g}, more than {entry.tolerance:.2g}"
            return entry.run
    reset_peak(device)
    entry.run(1)
    entrant.peak = peak_bytes(device)
    entrant.note = entry.note
    return entry.run


def timed(run: Callable[[int], float], i: int) -> tuple[float, float]:
    """Wall time in ms from an idle device to an idle device, and the items."""
    harness.synchronize()
    start = time.perf_counter()
    items = run(i)
    harness.synchronize()
    return 1e3 * (time.perf_counter() - start), items


def ratios(found: dict[str, Contestant], ours: str = "fastgfn") -> dict[str, float]:
    """How many times as fast as each rival we are, in items per second."""
    if not found[ours].is_timed:
        return {}
    return {n: found[ours].speed / c.speed for n, c in found.items() if n != ours and c.is_timed}


def make_rows(
    found: dict[str, Contestant], values: dict[str, float], *, item: str, packages: dict[str, str], **known
) -> list[dict]:
    """A row per provider; `values` are those of the goal, `packages` what a provider is of."""
    rows = []
    for name, c in found.items():
        row = goals.blank_row(provider=name, item=item, status=c.status, note=c.note, **known)
        row |= {"rounds": len(c.ms), "error": c.error, "baseline_bytes": c.baseline, "peak_bytes": c.peak}
        if c.is_timed:
            row |= harness.percentiles(c.ms)
            row |= {"items": round(statistics.mean(c.items), 1), "items_per_s": float(f"{c.speed:.5g}")}
        if name in values:
            row["value"] = float(f"{values[name]:.4g}")
        if name in packages:
            row["version"] = harness.version(packages[name])
        rows.append(row)
    return rows


def describe(row: dict) -> str:
    text = f"{row['goal']} {row['case']} {row['provider']}: "
    if row["ms_p50"] == "":
        return text + row["status"]
    text += f"{row['ms_p50']:.2f} ms ({row['ms_p20']:.2f} to {row['ms_p80']:.2f}), "
    text += f"{row['items_per_s']} {row['item']}s/s"
    text += f", step {row['step_ms']} ms" if row["step_ms"] != "" else ""
    text += f", value {row['value']}" if row["value"] != "" else ""
    text += f", error {row['error']}" if row["error"] != "" else ""
    if row["peak_bytes"] != "":
        peak, before = (row[f"{name}_bytes"] / 2**30 for name in ("peak", "baseline"))
        text += f", peak {peak:.2f} GiB of which {before:.2f} before"
    text += f" ({row['note']})" if row["note"] else ""
    return text if row["status"] == "ok" else f"{text}, {row['status']}"


class Run(NamedTuple):
    """What the goals of a process share: `seconds()` are left, `rounds` are timed, `write` keeps rows."""

    policy: Policy
    dtype: str
    rounds: int
    seconds: Callable[[], float]
    write: Callable[[list[dict]], None]

    def contest(self, providers: dict[str, Callable[[], Entry]], rounds: int | None = None):
        rounds = self.rounds if rounds is None else rounds
        return contest(providers, rounds=rounds, device=self.policy.device, seconds=self.seconds)


class Plan(NamedTuple):
    """By goal its setting, with `.model`, on a GPU and in a dry run; measure(goal, setting, run) -> ok."""

    full: dict
    dry: dict
    measure: dict[str, Callable]
    load: Callable[[str, torch.dtype, torch.device], Policy]


def run_goals(plan: Plan, names: list[str], out: Path, seconds: float, dry: bool) -> bool:
    """Measure goals, one model in memory at a time; whether fastgfn was timed in all of them.

    A goal that raises has a row that says so, and the next one is measured.
    """
    end = time.monotonic() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if dry else torch.bfloat16
    ok, policy, model = True, None, None

    def write(rows: list[dict]) -> None:
        for row in rows:
            print(describe(row), flush=True)
        harness.append_rows("goals", rows, None, out)

    for goal in names:
        setting = (plan.dry if dry else plan.full)[goal]
        try:
            if setting.model != model:
                policy, model = None, None
                free_memory()
                policy, model = plan.load(setting.model, dtype, device), setting.model
            name, rounds = ("fp32", 1) if dry else ("bf16", 3)
            run = Run(policy, name, rounds, lambda: end - time.monotonic(), write)
            ok &= plan.measure[goal](goal, setting, run)
        except Exception as error:
            traceback.print_exc()
            write([goals.blank_row(goal=goal, model=setting.model, status=status_of(error))])
            ok = False
    return ok


def serve(plan: Plan) -> None:
    parser = argparse.ArgumentParser(description="Some goals of goals.py, which starts this.")
    parser.add_argument("--goals", required=True, help="e.g. D1,D4")
    parser.add_argument("--out", type=Path, required=True, help="folder of goals.csv")
    parser.add_argument("--seconds", type=float, default=120, help="after which no case begins")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in float32")
    args = parser.parse_args()
    ok = run_goals(plan, args.goals.split(","), args.out, args.seconds, args.dry)
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of a rival that hangs would keep this process.
    os._exit(0 if ok else 1)
