"""Peak memory of one provider in one case: `python bench/peak.py test_bench_X.py CASE PROVIDER`.

Prints the harness.PeakMemory of this process. A bench runs it once per provider.
"""

import argparse
import importlib
from pathlib import Path

import harness
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", type=Path, help="the file of the bench")
    parser.add_argument("case", help="id of the case, as pytest shows it")
    parser.add_argument("provider")
    args = parser.parse_args()
    bench = importlib.import_module(args.bench.stem).BENCH
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {str(case): case for shapes in ("short", "full") for case in bench.cases(device, shapes)}
    case = known[args.case]
    step = bench.providers[args.provider].prepare(case, bench.make_inputs(case))
    harness.report_peak(step.run, warm=True)


if __name__ == "__main__":
    main()
