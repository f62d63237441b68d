"""Turn reports of `fastgfn train rng` into result rows: `python bench/rng_rows.py runs/*/report.json`."""

import argparse
import json
from pathlib import Path

import harness


def row(report: dict, folder: Path) -> dict:
    run = json.loads((folder / "run.json").read_text())
    measured = {f"{when}_{k}": f"{v:.4g}" for when in ("before", "after") for k, v in report[when].items()}
    fixed = {k: report[k] for k in ("seed", "steps", "trajectories", "tokens", "seconds")}
    task = {"terminator": run["terminator"], "penalty": run["penalty"], "lora_rank": run["lora_rank"]}
    own = {"target_invalid_mass": f"{report['target']['invalid_mass']:.4g}"}
    return {"model": report["model"], "weights": report["weights"], **task, **fixed, **own, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    paths = parser.parse_args().reports
    print(harness.append_rows("rng", [row(json.loads(p.read_text()), p.parent) for p in paths]))


if __name__ == "__main__":
    main()
