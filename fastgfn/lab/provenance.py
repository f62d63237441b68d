"""Which code, machine and versions a measurement is of: the first columns of every row of results."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, str | int]:
    """The columns that every row carries: when, which code, which machine, which versions.

    `dirty` is 1 if any file outside bench/results differs from the commit or is not in it. A copy without git
    takes `commit` from FASTGFN_COMMIT, which must name the clean commit that was copied; without that,
    `commit` is "unknown" and `dirty` 1.
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "commit": COMMIT,
        "dirty": DIRTY,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
    }


def device_name() -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found.group(1) if found else platform.machine()} x{os.cpu_count()}"


def version(package: str) -> str:
    """Installed version, "none" where the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# Read at import: what runs is what was imported, whatever is committed meanwhile. An installed copy may lie
# in a repository that is another project's.
COMMIT, DIRTY = "unknown", 1
if _git("rev-parse", "--show-toplevel") == str(ROOT):
    COMMIT = _git("rev-parse", "--short=12", "HEAD")
    DIRTY = int(bool(_git("status", "--porcelain", "--", ".", ":!bench/results")))
if COMMIT == "unknown" and os.getenv("FASTGFN_COMMIT"):
    COMMIT, DIRTY = os.environ["FASTGFN_COMMIT"], 0
