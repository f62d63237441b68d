"""Rewrite the README's tables from the committed rows: `python bench/tables.py`.

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; only the newest rows of clean commits
count (dirty = 0).
"""

import csv
import re

import harness


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
    rows = newest(read("rng"), "terminator", "seed")
    rows.sort(key=lambda r: (r["terminator"] != "newline", int(r["seed"])))
    header = ["terminator", "seed", *(f"`{c}`" for c in columns), "steps", "training s"]
    body = [
        [
            r["terminator"],
            r["seed"],
            *(number(r[f"after_{c}"]) for c in columns),
            r["steps"],
            f"{float(r['seconds']):.0f}",
        ]
        for r in rows
    ]
    before = rows[0]
    note = "before training: " + ", ".join(f"`{c}` {number(before[f'before_{c}'])}" for c in columns)
    return (
        f"{table(header, body)}\n\n{note}. All exact, none sampled. {before['model']}: {before['weights']}. "
        f"{before['device']}, commit {before['commit']}."
    )


def step() -> str:
    rows = [r for r in read("bench_step") if r["phase"] == "step"]
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
    first = rows[0]
    return (
        f"{table(header, body)}\n\n{first['device']}, {first['threads']} threads, commit {first['commit']}."
    )


def subtb() -> str:
    rows = read("subtb")
    rows = newest([r for r in rows if r["N"] == rows[-1]["N"]], "provider", "L")
    providers = sorted({r["provider"] for r in rows}, key=lambda p: (p != "fastgfn", p))
    lengths = sorted({int(r["L"]) for r in rows})
    cell = {(r["provider"], int(r["L"])): f"{float(r['ms_p50']):.2f}" for r in rows}
    body = [[str(t), *(cell.get((p, t), "") for p in providers)] for t in lengths]
    note = f"ms, forward and backward, N = {rows[0]['N']}, {rows[0]['device']}."
    return f"{table(['transitions', *providers], body)}\n\n{note}"


def main() -> None:
    path = harness.ROOT / "README.md"
    text = path.read_text()
    for name, make in (("rng", rng), ("step", step), ("subtb", subtb)):
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
