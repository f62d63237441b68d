"""Draw the times of the op benches from result rows: `python bench/plots.py [--out FOLDER]`.

One SVG per device and bench, bench/results/<device>/<bench>.svg, from the clean rows of its newest commit.
"""

import argparse
import csv
from pathlib import Path

import harness
import suite
import tables


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Time of every provider in every case: one line of points per provider, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(rows[0])
    sizes = columns[columns.index("dtype") + 1 : columns.index("repeats")]
    labels = [" ".join([r["mode"], r["dtype"], *(f"{s}={r[s]}" for s in sizes)]) for r in rows]
    cases = list(dict.fromkeys(labels))
    figure, axes = pyplot.subplots(figsize=(9, 2 + 0.3 * len(cases)), layout="constrained")
    for number, provider in enumerate(dict.fromkeys(r["provider"] for r in rows)):
        points = [
            (tables.time_of(r), cases.index(label))
            for r, label in zip(rows, labels, strict=True)
            if r["provider"] == provider and r["ms_p50"]
        ]
        if points:
            marker = "*" if suite.is_ours(provider) else "osv^D<>pPXhHd"[number % 13]
            axes.plot(*zip(*points, strict=True), marker, label=provider, alpha=0.8)
    axes.set(xscale="log", xlabel="ms", title=title, yticks=range(len(cases)), yticklabels=cases)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    pyplot.close(figure)


def draw(folder: Path | None = None) -> list[Path]:
    """Draw every bench that has clean rows, into `folder` or beside the rows."""
    paths = []
    for name in tables.OPS:
        for source in sorted(harness.RESULTS.glob(f"*/{name}.csv")):
            with source.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if r["dirty"] == "0"]
            if not rows:
                continue
            rows = [r for r in rows if r["commit"] == rows[-1]["commit"]]
            path = source.with_suffix(".svg")
            if folder is not None:
                path = folder / f"{source.parent.name}-{name}.svg"
                folder.mkdir(parents=True, exist_ok=True)
            plot(rows, f"{name}, {rows[-1]['device']}, commit {rows[-1]['commit']}", path)
            paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the pictures")
    for path in draw(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
