"""The goals on one GPU, and what measures them: `python bench/goals.py rollout|step --out FOLDER`.

Goals that share a model are measured in one process, so that what breaks or hangs one of them (a CUDA error
ends its process) leaves the others their rows. Rows go to FOLDER/goals.csv as they are measured; a goal whose
process ended early gets a row that says so.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import harness

# Seconds under which no process is started: torch and a model take that long.
LEAST = 15


# Measured by an op bench, whose rows tables.py reads.
OP_GOALS = ("D8",)


class Goal(NamedTuple):
    """`bar` must be reached, `aim` is hoped for; "x": times as fast, "%": a share; lowest: less is better."""

    what: str
    bar: float
    aim: float
    unit: str = "x"
    lowest: bool = False


GOALS = {
    "D1": Goal("tokens/s against `generate` (eager, LoRA beside the weights, log-probs)", 8, 15),
    "D2": Goal("tokens/s against `generate` compiled (StaticCache, CUDA graphs, LoRA merged)", 1.1, 1.4),
    "D3": Goal("tokens/s against continuous batching (CUDA graphs, LoRA merged)", 1.5, 2.5),
    "D4": Goal("what a step must read per second, of 4.3 TB/s, Llama-1B shape", 0.45, 0.60, "%"),
    "D5": Goal("what a step must read per second, of 4.3 TB/s, Llama-8B shape", 0.65, 0.78, "%"),
    "D6": Goal("what a step must read per second, of 4.3 TB/s, SmolLM2-135M shape, 20 rows", 0.07, 0.11, "%"),
    "D8": Goal(
        "attention of a step, shared prompts read once against once a row, prompt 200, 256 rows", 2, 4
    ),
    "S1": Goal("training micro-step against the published loop, GPT-2 XL shape, 20 x 30 tokens", 12, 30),
    "S2": Goal("the same, replayed sequences", 15, 40),
    "S3": Goal("the same, samples/s at each side's best batch", 20, 50),
    "S4": Goal("train pass over the tree against padded rows, prompt 200, 20 x 30 tokens", 2.5, 4),
    "S5": Goal("FLOP/s of the train pass, of 790 TFLOP/s, Llama-1B shape, 8k tokens", 0.35, 0.50, "%"),
    "S6": Goal("share of a step in which the GPU idles", 0.25, 0.10, "%", lowest=True),
}


class Group(NamedTuple):
    """Goals of one process, and its share of the time."""

    goals: tuple[str, ...]
    weight: float


# Sure things first; what may hang or compiles for a minute gets what they leave.
GROUPS = {
    "rollout": (
        Group(("D1", "D4"), 1.6),
        Group(("D6",), 0.6),
        Group(("D5",), 1.0),
        Group(("D3",), 1.0),
        Group(("D2",), 2.0),
    ),
    "step": (Group(("S1", "S6", "S2"), 2.0), Group(("S4", "S5"), 1.0), Group(("S3",), 1.5)),
}


def run_group(part: str, goals: tuple[str, ...], out: Path, soft: float, hard: float, dry: bool) -> str:
    """Measure some goals in a process of their own; "ok", or what went wrong.

    soft: seconds after which it starts nothing more; hard: after which it is ended, with all it has started.
    """
    script = Path(__file__).parent / f"bench_gpu_{part}.py"
    argv = [sys.executable, str(script), "--goals", ",".join(goals), "--out", str(out)]
    argv += [f"--seconds={soft:.0f}", *(["--dry"] if dry else [])]
    child = subprocess.Popen(argv, process_group=0)
    try:
        code = child.wait(hard)
        return "ok" if code == 0 else f"failed: ended with {code}"
    except subprocess.TimeoutExpired:
        return f"failed: ended after {hard:.0f} s"
    finally:
        # Its compilers, too.
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()


def columns() -> list[str]:
    """Those of goals.csv after the provenance."""
    return [
        *("goal", "case", "provider", "model", "dtype", "rank", "prompts", "n", "prompt_tokens"),
        *("output_tokens", "rounds", "ms_p20", "ms_p50", "ms_p80", "item", "items", "items_per_s"),
        *("value", "step_ms", "step_bytes", "error", "baseline_bytes", "peak_bytes", "version", "note"),
        "status",
    ]


def blank_row(**known) -> dict:
    """A row with what is known; the rest is empty."""
    row = dict.fromkeys(columns(), "")
    unknown = known.keys() - row.keys()
    if unknown:
        raise ValueError(
            f"blank_row: columns must be among {list(row)}, got {sorted(unknown)}; add them there"
        )
    return row | known


def measured(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(GROUPS))
    parser.add_argument("--out", type=Path, required=True, help="folder of goals.csv")
    parser.add_argument("--budget", type=float, default=300, help="seconds for all of the part")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, one process")
    args = parser.parse_args()
    end = time.monotonic() + args.budget
    groups = GROUPS[args.part]
    if args.dry:
        groups = (Group(tuple(goal for group in groups for goal in group.goals), 1.0),)
    path, failed = args.out / "goals.csv", False
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        if left < LEAST:
            print(f"{', '.join(group.goals)}: skipped, {max(left, 0):.0f} s are left", flush=True)
            continue
        share = max(left * group.weight / sum(g.weight for g in groups[i:]), LEAST)
        before = len(measured(path))
        # What overruns its share takes from the later ones.
        limits = 0.75 * share, min(left, 2 * share)
        status = run_group(args.part, group.goals, args.out, *limits, args.dry)
        new = measured(path)[before:]
        if status != "ok":
            print(f"{', '.join(group.goals)}: {status}", flush=True)
            lost = [g for g in group.goals if g not in {row["goal"] for row in new}]
            if lost:
                harness.append_rows("goals", [blank_row(goal=g, status=status) for g in lost], None, args.out)
        failed |= status != "ok"
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
