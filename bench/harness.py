"""What every bench shares: interleaved timing, peak memory of a fresh process, provenance, CSV rows."""

import csv
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastgfn.lab.provenance import provenance, version  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class PeakMemory(NamedTuple):
    """Bytes of one process: baseline before the measured step (imports, model, inputs), peak during it."""

    baseline_bytes: int
    peak_bytes: int


class Turns:
    """Providers that take turns in this process: every call is one round, which times each of them once.

    times[name] holds the wall time in ms of every round so far. The order is rotated every round, so that
    drift of the machine falls on all providers alike.
    """

    def __init__(self, providers: dict[str, Callable[[], object]]) -> None:
        self.providers = providers
        self.times: dict[str, list[float]] = {name: [] for name in providers}
        self.round = 0

    def order(self) -> list[str]:
        self.round += 1
        return rotated(list(self.providers), self.round - 1)

    def __call__(self) -> None:
        gc.collect()
        for name in self.order():
            synchronize()
            start = time.perf_counter()
            self.providers[name]()
            synchronize()
            self.times[name].append((time.perf_counter() - start) * 1e3)


def rotated(names: list[str], turn: int) -> list[str]:
    """`names`, beginning with another one every turn."""
    shift = turn % max(1, len(names))
    return names[shift:] + names[:shift]


def time_interleaved(
    providers: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall time in ms of every provider, `repeats` values each, taken in turns after `warmup` rounds."""
    turns = Turns(providers)
    for _ in range(warmup + repeats):
        turns()
    return {name: values[warmup:] for name, values in turns.times.items()}


def time_on_device(
    providers: dict[str, Callable[[], object]], host_ms: dict[str, float], repeats: int
) -> dict[str, list[float]]:
    """GPU time in ms of every provider, in turns: between two events, behind a backlog, with a cold L2 cache.

    The backlog lasts as long as the provider takes on the host (`host_ms`, at most 20 ms), so that launches
    are queued when their turn comes; a provider that waits for the GPU shows its gaps all the same.
    """
    turns = Turns(providers)
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(repeats):
        for name in turns.order():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            # About 2e6 cycles a millisecond.
            torch.cuda._sleep(int(2e6 * (0.1 + min(host_ms[name], 20.0))))
            start.record()
            providers[name]()
            end.record()
            torch.cuda.synchronize()
            turns.times[name].append(start.elapsed_time(end))
    return turns.times


def percentiles(values: Sequence[float], prefix: str = "ms") -> dict[str, float]:
    """`<prefix>_p20`, `<prefix>_p50`, `<prefix>_p80`, linearly interpolated between the ordered values."""
    quantiles = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double()
    )
    return {
        f"{prefix}_p{p}": float(f"{q:.5g}") for p, q in zip((20, 50, 80), quantiles.tolist(), strict=True)
    }


def report_peak(step: Callable[[], object], *, warm: bool = False) -> None:
    """In the child of `peak_memory`: run `step` once and print its PeakMemory as the last line.

    The high-water mark is reset first, so that a transient of loading the model does not count. `warm` runs
    the step once before that and gives back what it freed, so that compiling and tuning do not count either.
    """
    if warm:
        step()
    gc.collect()
    if warm:
        # Linux with glibc, as /proc below.
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        baseline = _status_bytes("VmHWM")
        step()
        peak = _status_bytes("VmHWM")
    print(json.dumps(PeakMemory(baseline, peak)._asdict()))


def peak_memory(argv: Sequence[str]) -> PeakMemory:
    """PeakMemory of `python *argv` in a fresh process, which must end in `report_peak`.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    child = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"peak_memory: {' '.join(argv)} exited {child.returncode}\n{child.stderr[-2000:]}")
    return PeakMemory(**json.loads(child.stdout.splitlines()[-1]))


def append_rows(
    bench: str, rows: list[dict], stamp: dict[str, str | int] | None = None, folder: Path | None = None
) -> Path:
    """Append rows, with provenance, to bench/results/<device>/<bench>.csv and return that path.

    stamp: the provenance of rows that another process measured; None: this process's.
    folder: write to folder/<bench>.csv instead.
    A file with the first of these columns only gets the new ones, empty in its older rows.

    Raises:
        ValueError: the rows' columns differ from one another or do not extend the header of the file.
    """
    for row in rows:
        if list(row) != list(rows[0]):
            raise ValueError(
                f"append_rows: every row must have columns {list(rows[0])}, got {list(row)}; "
                "give every row the same keys in the same order"
            )
    stamp = provenance() if stamp is None else stamp
    header = list(stamp) + list(rows[0])
    if folder is None:
        folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", str(stamp["device"]).lower()).strip("-")
    path = folder / f"{bench}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(header) + "\n")
    first, *older = path.read_text().splitlines()
    have = first.split(",")
    if have != header[: len(have)]:
        raise ValueError(
            f"append_rows: columns must begin with {have} as in {path}, got {header}; rename the old file"
        )
    new = header[len(have) :]
    if new:
        path.write_text("\n".join([",".join(header), *(line + "," * len(new) for line in older)]) + "\n")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=header, lineterminator="\n")
        for row in rows:
            writer.writerow(stamp | row)
    return path


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024
