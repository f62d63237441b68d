"""Results as rows, and rows as tables in Markdown: of the objectives, the problems, the behaviours."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from fastgfn.lab.presets import BEHAVIORS, EVERYWHERE, OBJECTIVES
from fastgfn.lab.runs import THRESHOLD, Result, tv_between

Row = dict[str, str]
# Below the table of the objectives, and that of the dense problems.
FIXED_POINTS = (
    'Where the second column says "no", the sampler of loss 0 is not R\'s posterior; that of '
    "rooted_prefix_tb is it only where no prefix lacks a reward, so not on the sparse problem. Unless "
    "settings say otherwise residuals are squared (Huber's for subtb and db, at twice the step size "
    "of the adapter), and trajectories as many for all: db makes two updates, of half the samples, "
    "where the others make one. A clamped residual has the same solution as a square but no gradient "
    "beyond its limit, so that what is farther away stays there. Termination drift is the mean of log "
    "q(stop) minus the target's where the target's strings end: below 0, q goes on where it should "
    "stop."
)
DENSE_NOTE = (
    "A cell without a spread is one seed. tb_scalar and rtb have one log Z for both prompts of "
    "tiny-prompts, whose log Z differ, so that their fixed point is not quite the posterior there."
)
METRICS = (
    "tv",
    "kl_target_to_model",
    "kl_model_to_target",
    "log_z_error",
    "mode_coverage",
    "invalid_mass",
    "termination_drift",
    "early_stop_drift",
    "mean_length",
    "target_mean_length",
)


def rows(results: Sequence[Result]) -> list[dict]:
    """A flat row per result, provenance apart. `tv_between` is the largest distance to the sampler of another
    behaviour of the same problem, objective and seed, empty where there is none."""
    found = []
    for result in results:
        others = [
            other
            for other in results
            if other is not result and (_same(other) == _same(result)) and other.behavior != result.behavior
        ]
        between = max((tv_between(result, other) for other in others), default=None)
        found.append(_row(result, between))
    return found


def _same(result: Result) -> tuple:
    return result.problem, result.objective, result.seed, json.dumps(result.overrides, sort_keys=True)


def _row(result: Result, between: float | None) -> dict:
    reached = result.seconds_to(THRESHOLD)
    fixed = ("problem", "kind", "model", "weights", "strings", "reward_temperature", "objective", "behavior")
    known = {k: getattr(result, k) for k in (*fixed, "posterior", "seed")}
    known["overrides"] = json.dumps(result.overrides, sort_keys=True)
    known |= {k: getattr(result, k) for k in ("steps", "trajectories", "tokens")}
    known |= {k: f"{getattr(result, k):.2f}" for k in ("seconds", "evaluation_seconds")}
    known |= {
        "start_tv": f"{result.start['tv']:.4g}",
        "best_tv": f"{result.best['tv']:.4g}",
        "seconds_to_tv": "" if reached is None else f"{reached:.2f}",
        "tv_between": "" if between is None else f"{between:.4g}",
    }
    known |= {name: f"{result.end.get(name, float('nan')):.4g}" for name in METRICS}
    return known | {"log_z_learned": f"{result.log_z_learned:.5g}", "error": result.error}


def text_rows(made: Iterable[dict]) -> list[Row]:
    """As a CSV file gives them back."""
    return [{k: str(v) for k, v in row.items()} for row in made]


def objectives(rows: Sequence[Row], dense: str, sparse: str) -> str:
    """A line per objective: what it reached on a dense and on the sparse problem under the default
    behaviour."""
    header = ["objective", "fixed point is the posterior"]
    for kind in ("dense", "sparse"):
        names = ("TV", "both KLs", "`log_z_error`", "modes", f"s to TV <= {THRESHOLD}")
        header += [f"{kind}: {name}" for name in names]
    header += ["sparse: termination drift", "sparse: early-stop drift"]
    body = []
    for name, preset in OBJECTIVES.items():
        line = [name, preset.posterior]
        for problem in (dense, sparse):
            own = _select(rows, problem=problem, objective=name, behavior="default")
            line += _reached(own)
        own = _select(rows, problem=sparse, objective=name, behavior="default")
        body.append([*line, *(spread(own, name) for name in ("termination_drift", "early_stop_drift"))])
    return f"{_table(header, body)}\n\n{FIXED_POINTS}"


def dense(rows: Sequence[Row], names: Sequence[str]) -> str:
    """TV of a line per objective and a column per problem, under the default behaviour."""
    body = []
    for objective in EVERYWHERE:
        line = [objective]
        for name in names:
            line.append(_reached(_select(rows, problem=name, objective=objective, behavior="default"))[0])
        body.append(line)
    return f"{_table(['objective', *names], body)}\n\n{DENSE_NOTE}"


def runs(rows: Sequence[Row]) -> str:
    """A line for whatever was run, of all its seeds."""
    header = ["problem", "objective", "fixed point is the posterior", "behaviour", "settings", "TV before"]
    header += ["TV", "both KLs", "`log_z_error`", "modes", f"s to TV <= {THRESHOLD}", "termination drift"]
    keys = ("problem", "objective", "posterior", "behavior", "overrides")
    body = []
    for known in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        own = _select(rows, **dict(zip(keys, known, strict=True)))
        known = [*known[:-1], "" if known[-1] == "{}" else known[-1], spread(own, "start_tv")]
        body.append([*known, *_reached(own), spread(own, "termination_drift")])
    return _table(header, body)


def _reached(own: Sequence[Row]) -> list[str]:
    if not own:
        return ["not measured"] + [""] * 4
    note = _note(own, "broke off", [row["error"] for row in own])
    note = note or _note(own, "fails", [not float(row["tv"]) <= THRESHOLD for row in own])
    names = ("log_z_error", "mode_coverage")
    ways = [[float(row[name]) for row in own] for name in ("kl_target_to_model", "kl_model_to_target")]
    kls = " / ".join(_short(sum(values) / len(values)) for values in ways)
    cells = [spread(own, "tv") + note, kls, *(spread(own, name) for name in names)]
    return [*cells, seconds(own)]


def _note(own: Sequence[Row], text: str, which: Sequence[object]) -> str:
    num = sum(map(bool, which))
    return "" if num == 0 else f", {text}" if num == len(own) else f", {text} in {num} of {len(own)}"


def problems(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line per problem: the default configuration."""
    header = ["problem", "kind", "model", "strings", "target T", "TV before", "TV", "both KLs"]
    header += ["`log_z_error`", "modes", f"s to TV <= {THRESHOLD}", "training s"]
    body = []
    for name in names:
        own = _select(rows, problem=name, objective="modified_subtb", behavior="default")
        if not own:
            body.append([name, *[""] * 5, "not measured", *[""] * 5])
            continue
        first = own[0]
        known = [first[k] for k in ("kind", "model", "strings", "reward_temperature")]
        body.append([name, *known, spread(own, "start_tv"), *_reached(own), spread(own, "seconds")])
    return _table(header, body)


def behaviors(rows: Sequence[Row], problem: str) -> str:
    """A line per behaviour of the default objective on one problem."""
    header = ["behaviour", "TV", "both KLs", "`log_z_error`", "modes", f"s to TV <= {THRESHOLD}"]
    header.append("largest TV to another's sampler")
    body = []
    for name in BEHAVIORS:
        own = _select(rows, problem=problem, objective="modified_subtb", behavior=name)
        between = [row for row in own if row["tv_between"]]
        body.append([name, *_reached(own), spread(between, "tv_between") if between else ""])
    return _table(header, body)


def notes(rows: Sequence[Row]) -> str:
    """What the figures are of: seeds, weights, machine and commit."""
    if not rows:
        return ""
    runs = {tuple(row[k] for k in ("problem", "objective", "behavior", "seed")) for row in rows}
    seeds = Counter(run[:-1] for run in runs).values()
    num = str(max(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    parts = [f"{num} seeds: mean (least to most)" if max(seeds) > 1 else "One seed"]
    parts += sorted({f"{row['model']}: {row['weights']} weights" for row in rows if row["model"] == "tiny"})
    parts += sorted({f"{row['model']}: {row['weights']}" for row in rows if row["model"] != "tiny"})
    parts += sorted({f"settings {r['overrides']}" for r in rows if r["overrides"] != "{}"})
    changed = {"0": "", "1": " with changes"}
    stamps = ((r, changed[r["dirty"]]) for r in rows)
    parts += sorted({f"{r['device']}, {r['threads']} threads, commit {r['commit']}{x}" for r, x in stamps})
    return "; ".join(parts) + ". All exact, none sampled."


def seconds(own: Sequence[Row]) -> str:
    """Training seconds to the threshold: of the runs that came there, and how many did."""
    reached = [row for row in own if row["seconds_to_tv"]]
    if not reached:
        return "never"
    return spread(own, "seconds_to_tv") + (
        "" if len(reached) == len(own) else f", {len(reached)} of {len(own)}"
    )


def spread(own: Sequence[Row], column: str) -> str:
    """Mean of a column, and least to most where there are several rows."""
    values = [float(row[column]) for row in own if row[column]]
    if not values:
        return ""
    mean, least, most = map(_short, (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _select(rows: Sequence[Row], **known: str) -> list[Row]:
    """The newest row of each seed with these values."""
    own = {row["seed"]: row for row in rows if all(row[k] == v for k, v in known.items())}
    return [own[seed] for seed in sorted(own, key=int)]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body]]
    return "\n".join(lines)
