"""From results of the laboratory to rows, and from rows to tables: what failed, what is missing."""

import csv
import json
import sys
from dataclasses import replace

import harness
import lab_rows
import pytest
import tables
import torch

from fastgfn.cli import lab as command
from fastgfn.lab import presets, runs, table
from fastgfn.lab.problems import DENSE_NAMES, NAMES
from fastgfn.lab.provenance import provenance

LOG_Q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log().tolist()


def result(seed=0, *, tv=0.01, log_q=LOG_Q, **changes):
    """Two evaluations; every metric is that of `tv`."""
    start, end = (dict.fromkeys(table.METRICS, x) | {"tv": x} for x in (0.9, tv))
    known = dict(
        problem="smallest",
        kind="sparse",
        model="tiny",
        weights="random",
        strings=6,
        reward_temperature=0.5,
        objective="modified_subtb",
        behavior="default",
        posterior="yes",
        seed=seed,
        settings={},
        overrides={},
        curve=[start | {"step": 0, "seconds": 0.0}, end | {"step": 3, "seconds": 7.0}],
        steps=3,
        seconds=7.0,
        evaluation_seconds=1.0,
        trajectories=96,
        tokens=200,
        log_z_learned=1.0,
        error="",
        provenance=provenance() | {"dirty": 0},
        log_q=log_q,
    )
    return runs.Result(**known | changes)


def rows(results):
    made = zip(results, table.rows(results), strict=True)
    return table.text_rows(r.provenance | row for r, row in made)


@pytest.fixture
def finished():
    return [result(0, tv=0.31), result(1, tv=0.22)]


def test_tables_have_a_line_each_and_say_what_is_missing(finished):
    first, second = finished
    changed = [replace(r, behavior="epsilon", log_q=[[0.0, -99.0, -99.0]] * 2) for r in finished]
    made = rows([first, second, *changed])
    assert made[0]["tv"] == f"{first.end['tv']:.4g}" and made[0]["seconds_to_tv"] == ""
    want = runs.tv_between(first, changed[0])
    assert 0 < want <= 1 and made[0]["tv_between"] == made[2]["tv_between"] == f"{want:.4g}"
    lines = table.objectives(made, "smallest", "absent").split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(presets.OBJECTIVES) == 14
    mean = (first.end["tv"] + second.end["tv"]) / 2
    assert (
        lines[2].startswith(f"| modified_subtb | yes | {mean:.2g}")
        and ", fails |" in lines[2]
        and "| never |" in lines[2]
    )
    assert all(line.count("not measured") == (1 if i == 0 else 2) for i, line in enumerate(lines[2:]))
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    shown = table.behaviors(made, "smallest").splitlines()
    assert len(shown) == 2 + len(presets.BEHAVIORS) and f"| {want:.2g}" in shown[2]
    assert "| smallest | sparse | tiny | 6 | 0.5 |" in table.problems(made, ["smallest", "absent"])
    assert table.notes(made).startswith("2 seeds") and first.provenance["commit"] in table.notes(made)
    assert table.notes([]) == ""


def test_rows_make_the_tables_of_the_readme(finished, tmp_path, monkeypatch):
    """Rows with the provenance of their run, of clean commits, without overrides."""
    folder = tmp_path / "cpu"
    stamp = finished[0].provenance | {"dirty": 0}
    clean = [replace(r, problem=presets.SPARSE, overrides={}, provenance=stamp) for r in finished]
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    empty = {name: tables.lab(name) for name in ("lab", "lab_dense", "lab_problems", "lab_behavior")}
    assert all("not measured" in text and stamp["commit"] not in text for text in empty.values())
    dirty = replace(clean[0], provenance=stamp | {"dirty": 1})
    for result in (dirty, replace(clean[0], overrides={"steps": 3}), *clean):
        target = command.Spec(result.problem, "modified_subtb", "default", result.seed).path(
            tmp_path / "runs"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result.to_dict()))
        monkeypatch.setattr(sys, "argv", ["lab_rows.py", str(tmp_path / "runs"), "--out", str(folder)])
        lab_rows.main()
    with (folder / "lab.csv").open(newline="") as file:
        assert [r["dirty"] for r in csv.DictReader(file)].count("0") == 4
    mean = f"{(finished[0].end['tv'] + finished[1].end['tv']) / 2:.2g}"
    for name, line in (("lab", "| modified_subtb |"), ("lab_problems", f"| {presets.SPARSE} |")):
        (found,) = [x for x in tables.lab(name).splitlines() if x.startswith(line)]
        assert f"| {mean}" in found and f"commit {stamp['commit']}" in tables.lab(name)
    assert tables.lab("lab_behavior") == empty["lab_behavior"]


@pytest.mark.parametrize(
    ("distances", "errors", "want"),
    [
        ((0.01, 0.02, 0.03), ("", "", ""), "| 0.02 (0.01 to 0.03) |"),
        ((0.01, 0.02, 0.6), ("", "", ""), "| 0.21 (0.01 to 0.6), fails in 1 of 3 |"),
        ((0.6, 0.6, float("nan")), ("", "", ""), ", fails |"),
        ((0.6, 0.6, 0.01), ("", "", "a nan"), ", broke off in 1 of 3 |"),
        ((0.6, 0.6, 0.6), ("a nan",) * 3, "| 0.6, broke off |"),
    ],
)
def test_how_many_seeds_fail(distances, errors, want):
    found = [result(i, tv=x, error=e) for i, (x, e) in enumerate(zip(distances, errors, strict=True))]
    (line,) = [x for x in table.problems(rows(found), ["smallest"]).splitlines() if "smallest" in x]
    assert want in line


def test_the_objectives_say_where_they_do_not_aim_at_the_posterior(finished):
    text = table.objectives(rows(finished), "smallest", "smallest")
    lines = {line.split(" | ")[0]: line.split(" | ")[1] for line in text.splitlines()[2:14]}
    assert lines["| length_normalized_tb"] == lines["| interpolated_subtb"] == "no"
    assert lines["| rooted_prefix_tb"] == "where no reward is missing" and lines["| vargrad"] == "yes"
    for said in (
        "is not R's posterior",
        "not on the sparse problem",
        "clamped",
        "no gradient beyond its limit",
    ):
        assert said in text.splitlines()[-1]


def test_a_report_holds_every_run_and_the_settings_and_commits_behind_it(tmp_path):
    """Of a combination that none of the other tables has, beside settings of one's own and changed files."""
    stamp = provenance() | {"dirty": 1}
    found = [
        result(problem="independent-sets", objective="vargrad", behavior="replay_75", provenance=stamp),
        result(problem="tiny-cold", overrides={"steps": 3}),
    ]
    command.report(found, tmp_path, with_plots=False)
    text = (tmp_path / "lab.md").read_text()
    assert "| independent-sets | vargrad | yes | replay_75 |  | 0.9 | 0.01 |" in text
    assert '| tiny-cold | modified_subtb | yes | default | {"steps": 3} | 0.9 | 0.01 |' in text
    assert "| tiny-cold | sparse | tiny |" in text and "not measured" not in text
    assert 'settings {"steps": 3}' in text and f"commit {stamp['commit']} with changes" in text
    everywhere = [result(problem=name) for name in NAMES]
    command.report(everywhere, tmp_path, with_plots=False)
    text = (tmp_path / "lab.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Runs", "## Problems", "## Objectives", "## Behaviours"]


def test_a_dense_problem_has_a_column_and_every_objective_a_line(tmp_path):
    found = [result(problem=name, objective="vargrad") for name in DENSE_NAMES[:2]]
    found += [result(problem=DENSE_NAMES[0], objective="db", tv=0.2), result(behavior="epsilon", tv=0.3)]
    text, note = table.dense(rows(found), DENSE_NAMES[:3]).split("\n\n")
    assert "one log Z for both prompts of tiny-prompts" in note
    lines = text.splitlines()
    assert lines[0] == "| objective | " + " | ".join(DENSE_NAMES[:3]) + " |"
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == list(presets.EVERYWHERE)
    assert "| vargrad | 0.01 | 0.01 | not measured |" in lines
    assert "| db | 0.2, fails | not measured | not measured |" in lines
    command.report(found, tmp_path, with_plots=False)
    assert (
        f"## Dense problems\n\n| objective | {DENSE_NAMES[0]} | {DENSE_NAMES[1]} |\n"
        in (tmp_path / "lab.md").read_text()
    )


def test_all_is_every_table_once():
    settings = command.LabSettings(
        everything=True,
        **dict(problems=[], objectives=[], behaviors=[], seeds=2, jobs=1, output=None),
        **dict(overrides={}, stop_at=None, overwrite=False, plots=False),
    )
    found = command.specs(settings)
    assert len(set(found)) == len(found) == 2 * sum(s.seed == 0 for s in found)
    shown = {(s.problem, s.objective) for s in found if s.behavior == "default"}
    assert {s.behavior for s in found} == set(presets.BEHAVIORS)
    assert {name for name, _ in shown} == set(NAMES)
    for name in (presets.DENSE, presets.SPARSE):
        assert {o for p, o in shown if p == name} == set(presets.OBJECTIVES)
    # with SmolLM2 these would take longer than all of the others together
    few = [name for name in DENSE_NAMES if all(p != name or o == "modified_subtb" for p, o in shown)]
    assert few == ["smollm2-continuation", "smollm2-infilling"]
    for name in set(DENSE_NAMES) - set(few):
        assert set(presets.EVERYWHERE) <= {o for p, o in shown if p == name}


def test_seconds_are_whole_numbers_with_their_spread():
    slow = [result(i, seconds=x) for i, x in enumerate((143.6, 187.2, 1712.0))]
    curves = [[r.curve[0], r.curve[1] | {"seconds": r.seconds}] for r in slow]
    made = rows([replace(r, curve=c) for r, c in zip(slow, curves, strict=True)])
    assert "| 681 (144 to 1712) | 681 (144 to 1712) |" in table.problems(made, ["smallest"])
    late = [*rows([result(0)]), *rows([result(1, tv=0.3)])]
    assert "| 7, 1 of 2 |" in table.problems(late, ["smallest"])


def test_the_note_says_how_many_seeds_the_lines_have():
    given = dict(
        problem="p", model="tiny", weights="random", overrides="{}", dirty="0", device="d", threads="1"
    )
    rows = [
        given | dict(objective=name, behavior="default", seed=str(seed), commit="c")
        for name, num in (("a", 3), ("b", 2))
        for seed in range(num)
    ]
    assert table.notes(rows).startswith("2 to 3 seeds: mean (least to most); ")
    assert table.notes(rows[:3]).startswith("3 seeds: mean")
    assert table.notes(rows[:1]).startswith("One seed; ")
