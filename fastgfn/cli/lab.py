"""`fastgfn lab`: train on problems whose posterior is known, and write what was reached."""

import contextlib
import csv
import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastgfn import checks
from fastgfn.checkpoint import read_json, write_json
from fastgfn.config import TrainConfig
from fastgfn.lab import plots, presets, table
from fastgfn.lab.problems import DENSE_NAMES, NAMES, SPECS
from fastgfn.lab.runs import Result, check_overrides, given_stop, run, target_temperature

DEFAULT_RUN = ("modified_subtb", "default")


@dataclass(frozen=True)
class Spec:
    """One run; its file in the output folder is named after it."""

    problem: str
    objective: str
    behavior: str
    seed: int

    def path(self, output: Path) -> Path:
        return output / self.problem / f"{self.objective}-{self.behavior}-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.problem}, {self.objective}, {self.behavior}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """Options of the command; see `fastgfn lab --help`."""

    everything: bool
    problems: Sequence[str]
    objectives: Sequence[str]
    behaviors: Sequence[str]
    seeds: int
    jobs: int
    output: Path
    overrides: dict
    stop_at: float | None
    overwrite: bool
    plots: bool


def specs(settings: LabSettings) -> list[Spec]:
    """The runs that were asked for, each once.

    Raises:
        InputError: unknown names, --all beside a choice of runs, or neither.
    """
    for flag, names, known in (
        ("--problem", settings.problems, NAMES),
        ("--objective", settings.objectives, presets.OBJECTIVES),
        ("--behavior", settings.behaviors, presets.BEHAVIORS),
    ):
        for name in names:
            presets.closest("lab", flag, name, known)
    for flag, value in (("--seeds", settings.seeds), ("--jobs", settings.jobs)):
        checks.check(value >= 1, "lab", flag, ">= 1", value, "raise it")
    chosen = [*settings.problems, *settings.objectives, *settings.behaviors]
    if settings.everything:
        have, fix = ", ".join(chosen), "drop it, or --all"
        checks.check(not chosen, "lab", "a choice of runs beside --all", "omitted", have, fix)
        found = [(name, *DEFAULT_RUN) for name in NAMES]
        compared = (presets.DENSE, presets.SPARSE)
        found += [(p, o, "default") for p, o in product(compared, presets.OBJECTIVES)]
        found += [(presets.DENSE, "modified_subtb", b) for b in presets.BEHAVIORS]
        tiny = [name for name in DENSE_NAMES if SPECS[name]["model"] == "tiny"]
        found += [(p, o, "default") for p, o in product(tiny, presets.EVERYWHERE)]
    else:
        fix = "pass --problem NAME (see --list) or --all"
        checks.check(bool(settings.problems), "lab", "--problem", "given", "none", fix)
        objectives = settings.objectives or [DEFAULT_RUN[0]]
        found = list(product(settings.problems, objectives, settings.behaviors or [DEFAULT_RUN[1]]))
    return [Spec(*names, seed) for seed in range(settings.seeds) for names in dict.fromkeys(found)]


def main(settings: LabSettings) -> bool:
    """Run what is missing, then write lab.csv, lab.md and the plots; False if it was interrupted."""
    console, output = Console(), settings.output
    wanted = specs(settings)
    _check_settings(wanted, settings)
    if settings.plots:
        plots.require_matplotlib()
    todo = [s for s in wanted if settings.overwrite or not _is_done(s, settings)]
    # what is only reported is read before the first run too, not after the last one
    load_all(output, besides={spec.path(output) for spec in todo})
    with _writable(output):
        for spec in wanted:
            folder = spec.path(output).parent
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    console.print(f"{len(wanted)} runs, {len(wanted) - len(todo)} of them done; {_estimate(todo, settings)}")
    interrupted = False
    try:
        for spec, result in _results(todo, settings, console):
            write_json(spec.path(output), result.to_dict())
            console.print(_line(spec, result), highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        interrupted = True
        goes_on = "" if settings.overwrite else ", the same command goes on with the others"
        console.print(f"interrupted; finished runs are kept{goes_on}")
    results = load_all(output)
    if results:
        report(results, output, with_plots=settings.plots)
        console.print(f"lab.md, lab.csv{' and plots' if settings.plots else ''}: {output}")
    return not interrupted


def load_all(output: Path, *, besides: Collection[Path] = ()) -> list[Result]:
    """The results of a folder, by path; other files there, and what a killed process left, are let be."""
    paths = [path for name in NAMES for path in (output / name).glob("[!.]*.json")]
    return [load(path) for path in sorted(paths) if path not in besides]


def load(path: Path) -> Result:
    """A result as the command wrote it.

    Raises:
        InputError: the file is not one.
    """
    values, known = read_json(path), set(Result.__dataclass_fields__)
    have, fix = f"{sorted(known ^ values.keys())[:3]} missing or unknown", "remove it or pass --overwrite"
    checks.check(known == values.keys(), "lab", str(path), "a result of `fastgfn lab`", have, fix)
    return Result(**values)


def report(results: Sequence[Result], output: Path, *, with_plots: bool) -> None:
    """lab.csv with a row per run, lab.md with the tables, and the plots."""
    made = [r.provenance | row for r, row in zip(results, table.rows(results), strict=True)]
    with (output / "lab.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(made[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    rows = table.text_rows(made)
    # those of the default configuration; what else was run is among the runs
    default = [r for r in rows if (r["objective"], r["behavior"]) == DEFAULT_RUN]
    names = [name for name in NAMES if name in {r["problem"] for r in default}]
    compared = [r for r in rows if r["problem"] in (presets.DENSE, presets.SPARSE)]
    parts = {"Runs": table.runs(rows)}
    if names:
        parts["Problems"] = table.problems(rows, names)
    if any(r["behavior"] == DEFAULT_RUN[1] for r in compared):
        parts["Objectives"] = table.objectives(rows, presets.DENSE, presets.SPARSE)
    others = set(presets.EVERYWHERE) - {DEFAULT_RUN[0]}
    default = [r for r in rows if r["behavior"] == DEFAULT_RUN[1] and r["objective"] in others]
    if names := [name for name in DENSE_NAMES if name in {r["problem"] for r in default}]:
        parts["Dense problems"] = table.dense(rows, names)
    if any(r["objective"] == DEFAULT_RUN[0] for r in compared if r["problem"] == presets.DENSE):
        parts["Behaviours"] = table.behaviors(rows, presets.DENSE)
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in parts.items())
    (output / "lab.md").write_text(f"# The laboratory\n\n{text}\n\n{table.notes(rows)}\n")
    if with_plots:
        plots.draw(results, output)


def show_list(console: Console) -> None:
    """What there is to choose from."""
    console.print("problems: " + ", ".join(NAMES), highlight=False)
    for title, known in (("objective", presets.OBJECTIVES), ("behavior", presets.BEHAVIORS)):
        shown = Table(title, "fixed point is the posterior", "settings over the default")
        for preset in known.values():
            settings = ", ".join(f"{k}={v}" for k, v in preset.settings.items())
            if preset.updates > 1:
                settings += f", {preset.updates} x steps, samples / {preset.updates}"
            shown.add_row(preset.name, preset.posterior, settings)
        console.print(shown)


def _is_done(spec: Spec, settings: LabSettings) -> bool:
    path = spec.path(settings.output)
    if not path.exists():
        return False
    result, fix = load(path), "pass --overwrite or another --output"
    want, have = settings.overrides | given_stop(settings.stop_at), result.overrides
    if have == want:
        # the presets may be others since
        known = json.loads(json.dumps(_settings(spec, settings)))
        have = {key: result.settings.get(key) for key in known}
        want = known
    different = [key for key in want | have if want.get(key) != have.get(key)]
    shown = [{key: values.get(key) for key in different} for values in (want, have)]
    checks.check(not different, "lab", f"settings of {path}", *shown, fix)
    return True


def _results(todo: Sequence[Spec], settings: LabSettings, console: Console) -> Iterator[tuple[Spec, Result]]:
    """Every run as it ends, in this process or in `jobs` others."""
    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn())
    options = dict(overrides=settings.overrides, stop_at=settings.stop_at)
    shown = TextColumn("{task.description}")
    with Progress(*columns, shown, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task("", total=len(todo))
        if settings.jobs > 1:
            for finished in _in_processes(todo, settings.jobs, options):
                yield finished
                progress.advance(bar)
            return
        for spec in todo:

            def on_step(step: int, steps: int, tv: float, spec: Spec = spec) -> None:
                progress.update(bar, description=f"{spec}: step {step} of {steps}, TV {tv:.3f}")

            yield spec, _run(spec, **options, on_step=on_step)
            progress.advance(bar)


def _in_processes(todo: Sequence[Spec], jobs: int, options: dict) -> Iterator[tuple[Spec, Result]]:
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (threads,))
    try:
        running = {pool.submit(_run, spec, **options): spec for spec in todo}
        for done in as_completed(running):
            yield running[done], done.result()
    except BaseException:
        # what runs would be waited for
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _run(spec: Spec, **options) -> Result:
    return run(spec.problem, objective=spec.objective, behavior=spec.behavior, seed=spec.seed, **options)


def _line(spec: Spec, result: Result) -> str:
    reached = result.seconds_to()
    when = "not reached" if reached is None else f"after {reached:.0f} s"
    error = f"; broke off: {result.error}" if result.error else ""
    tv = f"TV {result.start['tv']:.3f} -> {result.end['tv']:.4f}"
    return f"{spec}: {tv} in {result.seconds:.0f} s, <= 0.05 {when}{error}"


def _check_settings(wanted: Sequence[Spec], settings: LabSettings) -> None:
    """Refuse settings that contradict one another before the first run, whichever run they would break."""
    stop = settings.stop_at
    checks.check(stop is None or 0 < stop <= 1, "lab", "--stop-at", "in (0, 1]", stop, "change it")
    for spec in wanted:
        temperature = target_temperature(spec.objective, SPECS[spec.problem]["reward_temperature"])
        check_overrides(settings.overrides, spec.objective, temperature)
        TrainConfig.from_dict(_settings(spec, settings))


def _settings(spec: Spec, settings: LabSettings) -> dict:
    model = SPECS[spec.problem]["model"]
    return presets.settings(model, spec.objective, spec.behavior, settings.overrides)


def _estimate(todo: Sequence[Spec], settings: LabSettings) -> str:
    """A guess from the settings alone, so that it costs nothing."""
    total = 0.0
    for spec in todo:
        total += _settings(spec, settings)["steps"] * presets.SECONDS_PER_STEP[SPECS[spec.problem]["model"]]
    cores = min(settings.jobs, os.cpu_count() or 1)
    return f"about {max(1, round(total / 60 / cores))} minutes to go" if todo else "nothing to do"


@contextlib.contextmanager
def _writable(output: Path):
    try:
        yield
    except OSError as error:
        have = f"{output} ({error.strerror})"
        checks.fail("lab", "--output", "a writable folder", have, "choose another folder")
