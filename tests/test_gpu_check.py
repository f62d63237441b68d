"""`make gpu-check DRY=1` runs here what a GPU machine will run, without the GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(folder, **settings):
    environment = os.environ | {"OUT": str(folder / "out"), "PYTHON": sys.executable, "DRY": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "WHEELS": str(folder)} | settings
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh")]
    return subprocess.run(script, capture_output=True, text=True, env=environment, cwd=folder)


def test_parts_add_to_one_folder(tmp_path):
    done = check(tmp_path, PART="build subtb", KEEP_BUILD=str(tmp_path / "build"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (tmp_path / "build").iterdir()] == ["_C.abi3.so"]
    with (tmp_path / "out" / "subtb.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["provider"] for r in rows if r["status"] == "ok"} >= {"fastgfn", "window_loop"}
    # no time left: the cases are skipped, nothing fails, and the rows stay
    done = check(tmp_path, PART="draw", BUDGET="0")
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.split(",")[0] for line in summary.splitlines()] == ["build: ok", "subtb: ok", "draw: ok"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "_C.abi3.so",
        "check.log",
        "subtb.csv",
        "summary.txt",
    ]


def test_a_failing_part_shows_in_status_and_summary(tmp_path):
    done = check(tmp_path, PART="nonsense")
    assert done.returncode == 1
    assert "no part nonsense" in (tmp_path / "out" / "check.log").read_text()
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("nonsense: FAILED")
