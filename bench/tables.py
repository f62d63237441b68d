"""Rewrite the README's tables from the committed rows: `python bench/tables.py`.

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; only the newest rows of clean commits
count (dirty = 0). A case without a row reads "not measured".
"""

import csv
import importlib
import re
from functools import partial

import goals
import harness
import suite

from fastgfn.lab import presets
from fastgfn.lab import table as lab_table
from fastgfn.lab.problems import DENSE_NAMES, NAMES

OPS = ("head", "subtb", "attention", "path_attention", "draw")
# The settings that the tables are of; rows of other settings stay in the files.
RNG = {"model": "smollm2-135m", "penalty": "16.0", "lora_rank": "32"}
STEP = {"dtype": "fp32", "n": "20", "prompt_tokens": "50", "max_length": "30", "rank": "64"}


def read(bench: str) -> list[dict]:
    """Clean rows of a bench on every device, oldest first."""
    rows = []
    for path in sorted(harness.RESULTS.glob(f"*/{bench}.csv")):
        with path.open(newline="") as file:
            rows += [r for r in csv.DictReader(file) if r["dirty"] == "0"]
    return sorted(rows, key=lambda r: r["date"])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def newest(rows: list[dict], *key: str) -> list[dict]:
    found = {tuple(r[k] for k in key): r for r in rows}
    return [found[k] for k in sorted(found)]


def number(text: str) -> str:
    return f"{float(text):.2g}"


def rng() -> str:
    columns = ["invalid_mass", "tv", "kl_target_to_model", "kl_model_to_target", "log_z_error"]
    rows = [r for r in read("rng") if all(r[k] == v for k, v in RNG.items())]
    rows = newest(rows, "terminator", "seed")
    rows.sort(key=lambda r: (r["terminator"] != "newline", int(r["seed"])))
    header = ["terminator", "seed", *(f"`{c}`" for c in columns), "steps", "training s", "commit"]
    body = [
        [
            r["terminator"],
            r["seed"],
            *(number(r[f"after_{c}"]) for c in columns),
            r["steps"],
            f"{float(r['seconds']):.0f}",
            r["commit"][:7],
        ]
        for r in rows
    ]
    notes = []
    for r in newest(rows, "terminator"):
        before = ", ".join(f"`{c}` {number(r[f'before_{c}'])}" for c in columns)
        notes.append(f"Before training, {r['terminator']}: {before}.")
    stamps = sorted({f"{r['model']}: {r['weights']}. {r['device']}." for r in rows})
    return "\n".join(
        [table(header, body), "", *sorted(notes, reverse=True), *stamps, "All exact, none sampled."]
    )


def step() -> str:
    rows = [r for r in read("bench_step") if r["phase"] == "step"]
    rows = [r for r in rows if all(r[k] == v for k, v in STEP.items())]
    rows = newest(rows, "variant", "provider")
    ours = {r["variant"]: r for r in rows if r["provider"] == "fastgfn"}
    body = []
    for r in sorted(
        rows, key=lambda r: (r["variant"] != "sample", r["provider"] != "fastgfn", r["provider"])
    ):
        mine = ours[r["variant"]]
        ratio = float(r["ms_p50"]) / float(mine["ms_p50"])
        memory = f"{int(r['peak_bytes']) / 2**30:.2f} GiB" if r["peak_bytes"] else ""
        less = f"{int(r['peak_bytes']) / int(mine['peak_bytes']):.2f}x" if r["peak_bytes"] else ""
        seconds = f"{float(r['ms_p50']) / 1e3:.2f}"
        drawn = f"{float(r['drawn_tokens']):.0f}"
        body.append([r["variant"], r["provider"], seconds, f"{ratio:.2f}x", drawn, memory, less])
    header = ["variant", "provider", "seconds", "of ours", "tokens", "peak memory", "of ours"]
    stamps = sorted({f"{r['device']}, {r['threads']} threads, commit {r['commit']}" for r in rows})
    return f"{table(header, body)}\n\n{'; '.join(stamps)}."


def rollout() -> str:
    setting = ("device", "dtype", "prompts", "prompt_tokens", "n", "max_length", "rank")
    every = read("rollout")
    # runs of all providers, and where there is none, of fastgfn alone
    compared = {tuple(r[k] for k in (*setting, "date")) for r in every if r["provider"] == "generate"}
    settings = {key[:-1] for key in compared}
    rows = [
        r for r in every
        if tuple(r[k] for k in (*setting, "date")) in compared or tuple(r[k] for k in setting) not in settings
    ]  # fmt: skip
    rows = newest(rows, *setting, "provider")
    rows.sort(key=lambda r: (r["dtype"], int(r["prompts"]) * int(r["n"]), r["provider"]))
    header = ["dtype", "trajectories", "provider", "batch size", "tokens/s", "of generate", "mean length"]
    header += ["lengths p10, p50, p90"]
    body = []
    for r in rows:
        same = [o for o in rows if o["provider"] == "generate" and o["date"] == r["date"]]
        same = [o for o in same if all(o[k] == r[k] for k in setting)]
        ratio = f"{speed(r) / speed(same[0]):.2f}x" if same else ""
        total = str(int(r["prompts"]) * int(r["n"]))
        lengths = ", ".join(f"{float(r[f'length_{p}']):.0f}" for p in ("p10", "p50", "p90"))
        body.append(
            [
                r["dtype"],
                total,
                r["provider"],
                r["batch_size"] or "all",
                f"{speed(r):.0f}",
                ratio,
                r["length_mean"],
            ]
        )
        body[-1].append(lengths)
    stamps = sorted({f"{r['device']}, {r['threads']} threads, commit {r['commit']}" for r in rows})
    return f"{table(header, body)}\n\n{'; '.join(stamps)}." if rows else "not measured"


def goal_table() -> str:
    """A line per goal; what was measured is that of the newest rows of a GPU."""
    # a dry run is in float32
    rows = [r for r in read("goals") if is_gpu(r) and r["dtype"] != "fp32"] + prompt_rows()
    body = []
    for name, goal in goals.GOALS.items():
        found = newest([r for r in rows if r["goal"] == name], "goal", "case", "provider")
        bar, aim = (f"{'<=' if goal.lowest else '>='} {amount(x, goal)}" for x in (goal.bar, goal.aim))
        body.append([name, goal.what, bar, aim, goal_cell(goal, found)])
    notes = sorted({f"{r['device']}, commit {r['commit']}" for r in rows})
    text = table(["goal", "what", "bar", "aim", "measured"], body)
    return f"{text}\n\n{'; '.join(notes)}." if notes else text


def prompt_rows() -> list[dict]:
    """Rows of goal D8, of the path_attention bench: rivals are what reads a prompt for every row."""
    rows = []
    for case in importlib.import_module("test_bench_path_attention").BENCH.cases("cuda", "full"):
        run = newest_run("path_attention", case)
        mine = run.get("fastgfn")
        if (case["n"], case["P"]) != (256, 200) or mine is None:
            continue
        for name, r in run.items():
            value = time_of(r) / time_of(mine) if r["ms_p50"] and mine["ms_p50"] else ""
            label = ", ".join(f"{size} {case[size]}" for size in ("G", "H", "Hkv", "d"))
            if name == "fastgfn" or name.endswith("_unshared"):
                known = {"case": label, "value": value if name != "fastgfn" else "", "note": ""}
                rows.append(r | {"goal": "D8"} | known)
    return rows


def goal_cell(goal: goals.Goal, rows: list[dict]) -> str:
    """The value of every case, against its fastest rival, or why there is none."""
    dates = [r["date"] for r in rows if r["provider"]]
    # that a run was lost counts until the next one
    rows = [r for r in rows if r["provider"] or r["date"] > max(dates, default="")]
    measured, missing = [], []
    for case in dict.fromkeys(r["case"] for r in rows):
        own = [r for r in rows if r["case"] == case]
        label = f"{case}: " if case else ""
        values = {r["provider"]: float(r["value"]) for r in own if r["value"] and r["status"] == "ok"}
        reasons = [f"{r['provider']} {r['status']}".strip() for r in own if r["status"] != "ok"]
        if values:
            rival = min(values, key=values.get)
            notes = [r["note"] for r in own if r["provider"] == rival and r["note"]]
            beside = ", ".join([rival] * (len(own) > 2) + notes)
            measured.append(f"{label}{amount(values[rival], goal)}" + (f" ({beside})" if beside else ""))
        elif reasons:
            missing.append(label + ", ".join(reasons))
    return "; ".join(measured + missing).replace("|", "/") or "not measured"


def amount(value: float, goal: goals.Goal) -> str:
    return f"{100 * value:.3g}%" if goal.unit == "%" else f"{value:.3g}x"


def lab(name: str) -> str:
    """A table of the laboratory, of the presets' settings alone."""
    rows = [r for r in read("lab") if r["overrides"] == "{}"]
    if name == "lab":
        own = [r for r in rows if r["problem"] in (presets.DENSE, presets.SPARSE)]
        own = [r for r in own if r["behavior"] == "default"]
        text = lab_table.objectives(own, presets.DENSE, presets.SPARSE)
    elif name == "lab_problems":
        own = [r for r in rows if (r["objective"], r["behavior"]) == ("modified_subtb", "default")]
        text = lab_table.problems(own, NAMES)
    elif name == "lab_dense":
        own = [r for r in rows if r["problem"] in DENSE_NAMES and r["objective"] in presets.EVERYWHERE]
        own = [r for r in own if r["behavior"] == "default"]
        text = lab_table.dense(own, DENSE_NAMES)
    else:
        own = [r for r in rows if r["problem"] == presets.DENSE and r["objective"] == "modified_subtb"]
        text = lab_table.behaviors(own, presets.DENSE)
    return f"{text}\n\n{lab_table.notes(own)}" if own else text


def speed(row: dict) -> float:
    """Tokens per second: the mean number of a round over its median time."""
    return float(row["drawn_tokens"]) / float(row["ms_p50"]) * 1e3


def op(name: str) -> str:
    """A line per case of an op bench on a CPU and on a GPU; rivals as multiples of fastgfn's time."""
    bench = importlib.import_module(f"test_bench_{name}").BENCH
    cases = [c for device in ("cpu", "cuda") for c in bench.cases(device, "full")]
    lines = [(case, newest_run(name, case)) for case in cases]
    done = {p for _, run in lines for p, r in run.items() if r["ms_p50"]}
    rivals = [p for p in bench.providers if p in done and p != "fastgfn"]
    sizes = list(dict(cases[0].sizes))
    header = ["machine", "mode", "dtype", *sizes, "fastgfn", "extra memory", "of gemm", *rivals]
    body = []
    for case, run in lines:
        machine = "GPU" if case.device == "cuda" else "CPU"
        shape = [machine, case.mode, case.dtype, *(str(case[s]) for s in sizes)]
        body.append(shape + cells(run, rivals))
    columns = [i for i, title in enumerate(header) if title != "of gemm" or bench.norm(cases[0])]
    text = table([header[i] for i in columns], [[line[i] for i in columns] for line in body])
    stamps = {f"{r['device']}, commit {r['commit']}" for _, run in lines for r in run.values()}
    notes = ["Times are medians; a rival's is a multiple of fastgfn's", *sorted(stamps), *reasons(lines)]
    return f"{text}\n\n{'; '.join(notes)}."


def newest_run(name: str, case: suite.Case) -> dict[str, dict]:
    """provider -> row of the newest clean run of a case."""
    want = {"mode": case.mode, "dtype": case.dtype, **{k: str(v) for k, v in case.sizes}}
    rows = [r for r in read(name) if is_gpu(r) == (case.device == "cuda")]
    rows = [r for r in rows if all(r[k] == v for k, v in want.items())]
    return {r["provider"]: r for r in rows if r["date"] == rows[-1]["date"]}


def is_gpu(row: dict) -> bool:
    # A processor's name ends in its number of cores.
    return re.search(r" x\d+$", row["device"]) is None


def cells(run: dict[str, dict], rivals: list[str]) -> list[str]:
    """fastgfn's time, memory and multiple of the bare products, then the rivals' multiples of its time."""
    mine = run.get("fastgfn")
    if mine is None:
        return ["not measured"] * (3 + len(rivals))
    if not mine["ms_p50"]:
        return [mine["status"].split(":")[0], *[""] * (2 + len(rivals))]
    memory = ""
    if mine.get("peak_bytes"):
        memory = f"{(int(mine['peak_bytes']) - int(mine['baseline_bytes'])) / 2**20:.0f} MiB"
    of_gemm = f"{float(mine['of_gemm']):.2f}" if mine.get("of_gemm") else ""
    found = [f"{time_of(mine):.3g} ms", memory, of_gemm]
    for rival in rivals:
        row = run.get(rival)
        if row is not None and row["ms_p50"]:
            found.append(f"{time_of(row) / time_of(mine):.2f}x")
        else:
            found.append("not measured" if row is None else row["status"].split(":")[0])
    return found


def time_of(row: dict) -> float:
    return float(row.get(suite.DEVICE_TIME) or row["ms_p50"])


def reasons(lines: list[tuple[suite.Case, dict[str, dict]]]) -> list[str]:
    """Why a provider has no time, each reason once."""
    found = {
        f"{p} ({'GPU' if case.device == 'cuda' else 'CPU'}): {r['status']}": None
        for case, run in lines
        for p, r in run.items()
        if r.get("status") not in (None, "", "ok")
    }
    return list(found)


def main() -> None:
    path = harness.ROOT / "README.md"
    text = path.read_text()
    makers = {"rng": rng, "step": step, "rollout": rollout, "goals": goal_table}
    makers |= {name: partial(op, name) for name in OPS}
    makers |= {name: partial(lab, name) for name in ("lab", "lab_dense", "lab_problems", "lab_behavior")}
    for name, make in makers.items():
        block = f"<!-- begin {name} -->\n{make()}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->.*?<!-- end {name} -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise SystemExit(
                f"tables: README must hold <!-- begin {name} --> once, got {found}; add the markers"
            )
    path.write_text(text)


if __name__ == "__main__":
    main()
