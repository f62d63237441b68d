"""`make gpu-check DRY=1` runs here what a GPU machine will run, without the GPU."""

import csv
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(folder, **settings):
    environment = os.environ | {"OUT": str(folder / "out"), "PYTHON": sys.executable, "DRY": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "WHEELS": str(folder)} | settings
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh")]
    return subprocess.run(script, capture_output=True, text=True, env=environment, cwd=folder)


def rows_of(folder, bench):
    with tarfile.open(folder / "rows.tar.gz") as archive:
        return list(csv.DictReader(archive.extractfile(f"{bench}.csv").read().decode().splitlines()))


def test_parts_add_to_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "head.csv").write_text("date,provider\ntoday,gemm\n")
    with tarfile.open(tmp_path / "out" / "rows.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "head.csv", "head.csv")
    done = check(tmp_path, PART="build subtb", KEEP_BUILD=str(tmp_path / "build"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (tmp_path / "build").iterdir()] == ["_C.abi3.so"]
    rows = rows_of(tmp_path / "out", "subtb")
    assert {r["provider"] for r in rows if r["status"] == "ok"} >= {"fastgfn", "window_loop"}
    # no time left: the cases are skipped, nothing fails, and the rows stay
    done = check(tmp_path, PART="draw rollout goals", BUDGET="0")
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    ran = ["build: ok", "subtb: ok", "draw: ok", "rollout: ok", "goals: ok"]
    assert [line.split(",")[0] for line in summary.splitlines()] == ran
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "_C.abi3.so",
        "check.log",
        "rows.tar.gz",
        "summary.txt",
    ]
    assert rows_of(tmp_path / "out", "subtb") == rows
    assert rows_of(tmp_path / "out", "head") == [{"date": "today", "provider": "gemm"}]


def test_a_failing_part_shows_in_status_and_summary(tmp_path):
    done = check(tmp_path, PART="nonsense")
    assert done.returncode == 1
    assert "no part nonsense" in (tmp_path / "out" / "check.log").read_text()
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("nonsense: FAILED")


def test_tests_that_take_too_long_leave_the_later_parts_their_time(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *xdist*) ;; *"-m pytest"*) echo "$@"; exec sleep 60 ;; esac\n')
    python.chmod(0o755)
    start = time.monotonic()
    done = check(tmp_path, PART="tests rollout", BUDGET="6", DRY="", PYTHON=str(python))
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert "-m gpu -n 8 tests" in done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in summary] == ["tests: FAILED", "rollout: ok"]
