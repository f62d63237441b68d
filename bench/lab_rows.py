"""Turn results of `fastgfn lab` into result rows: `python bench/lab_rows.py runs/lab`.

Every row keeps the provenance of the run that measured it.
"""

import argparse
from pathlib import Path

import harness

from fastgfn import checks
from fastgfn.cli.lab import load_all
from fastgfn.lab import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder that the command wrote")
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV file; bench/results/<device> unless given"
    )
    arguments = parser.parse_args()
    results = load_all(arguments.output)
    checks.check(bool(results), "lab_rows", "the folder", "of results", arguments.output, "pass --output's")
    for result, row in zip(results, table.rows(results), strict=True):
        path = harness.append_rows("lab", [row], result.provenance, arguments.out)
    print(path)


if __name__ == "__main__":
    main()
