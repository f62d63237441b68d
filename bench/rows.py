"""Turn the JSON of pytest-benchmark into result rows: `python bench/rows.py out.json [--out FOLDER]`.

Appends to bench/results/<device>/<bench>.csv, or to FOLDER/<bench>.csv, with the provenance of the run that
measured them, and prints them.
"""

import argparse
import json
from pathlib import Path

import harness
import suite


def convert(report: dict, folder: Path | None = None) -> list[Path]:
    """Append the rows of a report of pytest-benchmark and return the files, one per bench.

    Raises:
        ValueError: a benchmark of the report carries no rows; those of the others are written.
    """
    found: dict[str, list] = {}
    for entry in report["benchmarks"]:
        if "rows" in entry["extra_info"]:
            found.setdefault(entry["extra_info"]["bench"], []).append(entry["extra_info"])
    paths = []
    for bench, infos in found.items():
        # One stamp per run, or its rows could not be told from those of another run.
        stamp = infos[-1]["provenance"]
        paths.append(harness.append_rows(bench, [r for i in infos for r in i["rows"]], stamp, folder))
    # What broke after it was timed, e.g. under another clock.
    lost = [entry["name"] for entry in report["benchmarks"] if "rows" not in entry["extra_info"]]
    if lost:
        raise ValueError(
            f"rows: {', '.join(lost)} must have rows in extra_info, got none; run `pytest bench`"
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, help="folder of the CSV files")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    for entry in report["benchmarks"]:
        print(f"{entry['name']}\n{suite.describe(entry['extra_info'].get('rows', []))}")
    for path in convert(report, args.out):
        print(path)


if __name__ == "__main__":
    main()
