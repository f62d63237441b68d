"""Pictures of results: TV against training seconds per problem, and what every run ended with."""

from collections.abc import Sequence
from pathlib import Path

from fastgfn import checks
from fastgfn.lab.runs import THRESHOLD, Result


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fix = "run `pip install 'fastgfn[plots]'` or pass --no-plots"
        checks.missing_package("lab", "matplotlib", fix)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """curves-<problem>.svg for every problem, and bars.svg; returns their paths."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    # equal results give equal files
    matplotlib.rcParams["svg.hashsalt"] = "fastgfn"
    paths = []
    for problem in dict.fromkeys(r.problem for r in results):
        path = folder / f"curves-{problem}.svg"
        _curves([r for r in results if r.problem == problem], problem, path)
        paths.append(path)
    _bars(results, folder / "bars.svg")
    return [*paths, folder / "bars.svg"]


def label(result: Result) -> str:
    names = [n for n in (result.objective, result.behavior) if n not in ("modified_subtb", "default")]
    return ", ".join(names) or "default"


def _curves(results: Sequence[Result], problem: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    names = list(dict.fromkeys(map(label, results)))
    for result in results:
        points = [(p["seconds"], max(p["tv"], 1e-4)) for p in result.curve]
        number = names.index(label(result))
        line = ("-", "--", ":")[number // 10 % 3]
        (drawn,) = axes.plot(*zip(*points, strict=True), line, color=f"C{number % 10}", lw=1.2)
        if label(result) not in axes.get_legend_handles_labels()[1]:
            drawn.set_label(label(result))
    axes.axhline(THRESHOLD, color="grey", lw=0.8)
    axes.set(yscale="log", xlabel="training seconds", ylabel="total variation", title=problem)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _bars(results: Sequence[Result], path: Path) -> None:
    from matplotlib import pyplot

    runs = [f"{r.problem}: {label(r)}" for r in results]
    names = list(dict.fromkeys(runs))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        values = [r.end["tv"] for r, run in zip(results, runs, strict=True) if run == name]
        axes.barh(place, sum(values) / len(values), color="#4477aa")
        axes.plot(values, [place] * len(values), "k.", ms=3)
    axes.axvline(THRESHOLD, color="#cc3311", lw=0.8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="total variation at the end")
    axes.tick_params(labelsize="small")
    axes.invert_yaxis()
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
