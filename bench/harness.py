"""What every bench shares: interleaved timing, peak memory of a fresh process, provenance, CSV rows."""

import csv
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class PeakMemory(NamedTuple):
    """Bytes of one process: baseline before the measured step (imports, model, inputs), peak during it."""

    baseline_bytes: int
    peak_bytes: int


def time_interleaved(
    providers: dict[str, Callable[[], None]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall time in ms of every provider, `repeats` values each, measured in turns in this process.

    The order is rotated every round, so that drift of the machine falls on all providers alike.
    """
    names = list(providers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(warmup + repeats):
        gc.collect()
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize()
            start = time.perf_counter()
            providers[name]()
            _synchronize()
            if r >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def percentiles(values: Sequence[float], prefix: str = "ms") -> dict[str, float]:
    """`<prefix>_p20`, `<prefix>_p50`, `<prefix>_p80`, linearly interpolated between the ordered values."""
    quantiles = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double()
    )
    return {
        f"{prefix}_p{p}": float(f"{q:.5g}") for p, q in zip((20, 50, 80), quantiles.tolist(), strict=True)
    }


def report_peak(step: Callable[[], None]) -> None:
    """In the child of `peak_memory`: run `step` once and print its PeakMemory as the last line.

    The high-water mark is reset first, so that a transient of loading the model does not count.
    """
    gc.collect()
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


def provenance() -> dict[str, str | int]:
    """The columns that every row carries: when, which code, which machine, which versions.

    `dirty` is 1 if any file outside bench/results differs from the commit or is not in it; outside a git
    checkout `commit` is "unknown" and `dirty` 1.
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "commit": COMMIT,
        "dirty": DIRTY,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def device_name() -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found.group(1) if found else platform.machine()} x{os.cpu_count()}"


def append_rows(bench: str, rows: list[dict]) -> Path:
    """Append rows, with provenance, to bench/results/<device>/<bench>.csv and return that path.

    Raises:
        ValueError: the rows' columns differ from one another or from the header of the file.
    """
    for row in rows:
        if list(row) != list(rows[0]):
            raise ValueError(
                f"append_rows: every row must have columns {list(rows[0])}, got {list(row)}; "
                "give every row the same keys in the same order"
            )
    stamp = provenance()
    header = list(stamp) + list(rows[0])
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = RESULTS / slug / f"{bench}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        have = path.read_text().split("\n", 1)[0].split(",")
        if have != header:
            raise ValueError(
                f"append_rows: columns must be {have} as in {path}, got {header}; rename the old file"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=header, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(stamp | row)
    return path


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


# Read at import: what runs is what was imported, whatever is committed meanwhile.
COMMIT = _git("rev-parse", "--short=12", "HEAD")
DIRTY = int(bool(_git("status", "--porcelain", "--", ".", ":!bench/results")))
