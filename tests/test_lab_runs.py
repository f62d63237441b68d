"""Runs of the laboratory: reproducible, resumable, counted in training seconds, refused early."""

import csv
import json
import math
import sys
from dataclasses import replace

import lab_rows
import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.cli import lab as command
from fastgfn.cli import main
from fastgfn.lab import presets, runs, table
from fastgfn.lab.problems import NAMES, build_problem
from fastgfn.models.adapter import PARTIAL
from fastgfn.packing import pack
from fastgfn.rewards import log_reward
from fastgfn.rollout import sample

SPEC = {
    "name": "smallest",
    "about": "the digits add up to 3",
    "kind": "sparse",
    "model": "tiny",
    "vocab_size": 4,
    "base_seed": 0,
    "peak": 2.0,
    "prompts": [[1], [2, 3]],
    "stop": 0,
    "min_length": 0,
    "max_length": 2,
    "reward": {"type": "digit_sum", "target": 3, "log_miss": -3.0},
    "reward_temperature": 0.5,
    "num_strings": 13,
}
# as many samples as let every step be evaluated
FEW = {"steps": 3, "num_samples": 32, "warmup_steps": 1, "replay_share": (0.0, 0.0)}
EXACT = set(table.METRICS)


@pytest.fixture(scope="module")
def problem():
    return lambda seed=0: build_problem(SPEC, seed=seed, lora_rank=2)


@pytest.fixture(scope="module")
def finished(problem):
    return [runs.run(problem(seed), seed=seed, overrides=FEW) for seed in (0, 1)]


@pytest.fixture
def small(monkeypatch, problem, tmp_path):
    """The command on the smallest problem, in an empty folder: (exit code, output, error output)."""
    monkeypatch.setattr(runs, "load_problem", lambda name, *, seed: replace(problem(seed), name=name))
    monkeypatch.chdir(tmp_path)

    def call(capsys, *args):
        monkeypatch.setattr(sys, "argv", ["fastgfn", "lab", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


def _exact(result):
    return [{k: v for k, v in point.items() if k != "seconds"} for point in result.curve]


def test_a_run_reproduces_itself_by_seed(problem, finished):
    again = runs.run(problem(), seed=0, overrides=FEW)
    first, other = finished
    assert _exact(again) == _exact(first) and again.log_q == first.log_q
    assert first.log_q != other.log_q
    assert [point["step"] for point in first.curve] == [0, 1, 2, 3]
    assert set(first.end) >= EXACT and first.strings == 26 and first.error == ""
    assert first.steps == 3 and first.trajectories == 96 and first.tokens >= 96


def test_the_whole_budget_is_spent_unless_asked(problem):
    whole = runs.run(problem(), overrides=FEW)
    cut = runs.run(problem(), overrides=FEW, stop_at=1.0)
    assert (whole.steps, cut.steps) == (3, 1) and _exact(cut) == _exact(whole)[:2]
    # a table of whole budgets leaves it out
    assert cut.overrides == FEW | {"stop_at": 1.0} and whole.overrides == FEW


def test_training_lowers_the_exact_distance(problem):
    result = runs.run(
        problem(), overrides={"steps": 60, "num_samples": 24, "learning_rate": 2e-2, "warmup_steps": 3}
    )
    assert result.start["tv"] > 0.5 and result.end["tv"] < result.start["tv"] / 2
    assert 0 < result.seconds_to(0.6) <= result.seconds and result.best["tv"] <= result.end["tv"]
    target = problem().posteriors[0].log_target.exp()
    own = 0.5 * float((torch.tensor(result.log_q[0], dtype=torch.float64).exp() - target).abs().sum())
    assert own <= result.end["tv"] + 1e-6


def test_evaluation_does_not_count_as_training(problem, monkeypatch):
    """A clock that only moves in an evaluation."""
    clock, evaluate = [0.0], type(problem()).evaluate

    def slow(self):
        clock[0] += 7.0
        return evaluate(self)

    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(type(problem()), "evaluate", slow)
    result = runs.run(problem(), overrides=FEW)
    assert result.seconds == 0.0 and result.evaluation_seconds == 7.0 * len(result.curve)


@pytest.mark.parametrize(
    ("distances", "want"),
    [
        ([0.9, 0.04, 0.03], 1.0),
        ([0.9, 0.04, 0.06, 0.05, 0.01], 3.0),
        ([0.9, 0.04, 0.06], None),
        ([0.9, 0.04, math.nan, 0.01], 3.0),
        ([0.9, 0.2], None),
        ([0.05], 0.0),
    ],
)
def test_seconds_to_a_threshold_that_is_kept(distances, want):
    curve = [{"seconds": float(i), "tv": tv} for i, tv in enumerate(distances)]
    assert runs.seconds_to(curve, 0.05) == want


def test_few_evaluations_where_strings_are_many(problem):
    few = problem()
    config = runs.TrainConfig(steps=400, num_samples=10)
    assert runs.evaluate_every(few, config) == 10
    many = replace(few, posteriors=few.posteriors * 500)
    nodes = sum(p.tree.num_nodes for p in many.posteriors)
    every = runs.evaluate_every(many, config)
    # half of the longest sequences, five passes over each step's nodes
    assert nodes / every == pytest.approx(0.2 * 5 * 10 * 1, rel=0.02)


def _rows(results):
    return [r.provenance | row for r, row in zip(results, table.rows(results), strict=True)]


def test_a_run_that_breaks_off_says_why(problem, monkeypatch):
    step = runs.Trainer.step

    def breaks(self):
        if self.steps_done == 2:
            raise InputError("Trainer.step: the gradient norm must be finite, got nan; lower learning_rate")
        return step(self)

    monkeypatch.setattr(runs.Trainer, "step", breaks)
    result = runs.run(problem(), overrides=FEW)
    assert result.steps == 2 and result.end["step"] == 2 and "lower learning_rate" in result.error
    assert ", broke off |" in table.problems(table.text_rows(_rows([result])), ["smallest"])


def test_a_relative_objective_has_the_same_target(problem):
    """log of the reward that it is given, plus log p_base, is log R / T on every string."""
    own = problem()
    drawn = sample(own.prompts, policy=own.policy, constraints=own.constraints, num_samples=30, seed=1)
    tree = pack(drawn)
    given = log_reward(tree, reward=runs.OverPrior(own.reward, own.reward_temperature, own.policy.reference))
    base = problem()
    with torch.no_grad():
        for name, p in base.policy.parameters():
            if "lora_B" in name:
                p.zero_()
    log_p = [dict(zip(map(tuple, x.sequences), y, strict=True)) for x, y in _log_probs(base)]
    targets = [dict(zip(map(tuple, p.sequences), p.log_reward, strict=True)) for p in own.posteriors]
    for z, group, leaf in zip(drawn.sequences(), drawn.group.tolist(), tree.leaf.tolist(), strict=True):
        want = float(targets[group][tuple(z)]) - float(log_p[group][tuple(z)])
        assert float(given[leaf]) == pytest.approx(want, abs=1e-5)


def _log_probs(problem):
    return [(p, runs.log_probs(p, problem.policy)) for p in problem.posteriors]


def test_the_command_keeps_finished_runs(small, capsys, tmp_path):
    options = ("--output", "lab", "--problem", NAMES[0], "--seeds", 2, "--steps", 3, "--set", "num_samples=4")
    code, out, _ = small(capsys, *options)
    assert code == 0 and "2 runs, 0 of them done" in out
    files = sorted((tmp_path / "lab").glob("*/*.json"))
    assert [f.name for f in files] == [f"modified_subtb-default-{seed}.json" for seed in (0, 1)]
    before = [f.read_bytes() for f in files]
    result = command.load(files[0])
    assert result.steps == 3 and {"commit", "device", "threads", "torch"} <= result.provenance.keys()
    with (tmp_path / "lab" / "lab.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and json.loads(rows[0]["overrides"]) == {"num_samples": 4, "steps": 3}
    assert f"| {NAMES[0]} |" in (tmp_path / "lab" / "lab.md").read_text()
    assert (tmp_path / "lab" / f"curves-{NAMES[0]}.svg").stat().st_size > 1000
    assert (tmp_path / "lab" / "bars.svg").exists()
    code, out, _ = small(capsys, *options, "--no-plots")
    assert code == 0 and "2 runs, 2 of them done; nothing to do" in out
    assert [f.read_bytes() for f in files] == before
    code, _, error = small(capsys, *options[:-1], "num_samples=5")
    assert code == 2 and "pass --overwrite or another --output" in error and error.count("\n") == 1
    files[0].write_text("{}")
    code, _, error = small(capsys, *options)
    assert code == 2 and "must be a result of `fastgfn lab`" in error and error.count("\n") == 1


def test_settings_of_an_objective_go_with_it(small, capsys, tmp_path):
    """They are refused beside another one, which the default is."""
    options = (
        "--output",
        "lab",
        "--problem",
        NAMES[0],
        "--steps",
        1,
        "--set",
        "rooted_eta=0.5",
        "--no-plots",
    )
    code, _, error = small(capsys, *options)
    assert code == 2 and "rooted_eta must be 0.25 with objective='modified_subtb'" in error
    code, _, error = small(capsys, *options, "--objective", "rooted_prefix_tb")
    assert code == 0, error
    (file,) = (tmp_path / "lab").glob("*/*.json")
    assert command.load(file).settings["rooted_eta"] == 0.5


def test_only_results_are_read_and_before_the_first_run(small, capsys, tmp_path, monkeypatch):
    """Other JSON files, what a killed process left, and a broken result of a run that is not asked for."""
    options = ("--output", "runs", "--problem", NAMES[0], "--steps", 1, "--no-plots")
    for name in ("demo/report.json", f"{NAMES[0]}/{PARTIAL}modified_subtb-default-0.json"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text("{")
    code, _, error = small(capsys, *options)
    assert code == 0 and (tmp_path / "runs" / "lab.md").exists(), error
    (tmp_path / "runs" / NAMES[1]).mkdir()
    (tmp_path / "runs" / NAMES[1] / "vargrad-default-7.json").write_text('{"problem"')
    monkeypatch.setattr(command, "run", None)
    code, _, error = small(capsys, *options, "--overwrite")
    assert code == 2 and "vargrad-default-7.json must be a readable JSON file" in error, error
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["lab_rows.py", str(tmp_path / "empty")])
    with pytest.raises(InputError, match="the folder must be of results"):
        lab_rows.main()


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_run(
    small, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(command, "run", None)
    (tmp_path / "file").touch()
    options = ("--problem", NAMES[0], "--no-plots", "--output")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, error = small(capsys, *options, folder)
        assert code == 2 and "--output must be a writable folder, got" in error and error.count("\n") == 1
    # the folder is there, on a file system that is read-only
    monkeypatch.setattr(command.os, "access", lambda path, mode: False)
    code, _, error = small(capsys, *options, "lab")
    assert code == 2 and "--output must be a writable folder, got lab (Permission denied)" in error


def test_missing_matplotlib_is_noticed_before_the_first_run(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--problem", NAMES[0], "--steps", 1, "--output", "lab")
    code, _, error = small(capsys, *options)
    assert code == 2 and "pass --no-plots" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert small(capsys, *options, "--no-plots")[0] == 0


def test_a_run_that_was_cut_short_is_no_whole_one(small, capsys, tmp_path):
    options = ("--output", "lab", "--problem", NAMES[0], "--steps", 3, "--no-plots")
    assert small(capsys, *options, "--stop-at", 1)[0] == 0
    (file,) = (tmp_path / "lab").glob("*/*.json")
    assert command.load(file).steps == 1
    code, _, error = small(capsys, *options)
    assert code == 2 and "got {'stop_at': 1.0}; pass --overwrite" in error, error
    code, out, _ = small(capsys, *options, "--stop-at", 1)
    assert code == 0 and "1 runs, 1 of them done" in out


def test_ctrl_c_keeps_what_is_finished(small, capsys, tmp_path, monkeypatch):
    seen, run = [], runs.run

    def interrupted(*args, **options):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return run(*args, **options)

    monkeypatch.setattr(command, "run", interrupted)
    options = ("--output", "lab", "--problem", NAMES[0], "--seeds", 3, "--steps", 1, "--no-plots")
    code, out, _ = small(capsys, *options)
    assert code == 130 and "finished runs are kept" in out
    assert len(list((tmp_path / "lab").glob("*/*.json"))) == 1 and (tmp_path / "lab" / "lab.md").exists()
    monkeypatch.setattr(command, "run", run)
    code, out, _ = small(capsys, *options)
    assert code == 0 and "3 runs, 1 of them done" in out


def test_the_list_names_everything(small, capsys):
    code, out, _ = small(capsys, "--list")
    assert code == 0
    assert all(name in out for name in (*NAMES, *presets.OBJECTIVES, *presets.BEHAVIORS))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--problem", f"{NAMES[0]}s"], f"did you mean '{NAMES[0]}'?"),
        (["--problem", NAMES[0], "--objective", "vargard"], "did you mean 'vargrad'?"),
        (["--problem", NAMES[0], "--behavior", "on-policy"], "did you mean 'on_policy'?"),
        (["--problem", NAMES[0], "--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--all", "--objective", "vargrad"], "a choice of runs beside --all must be omitted, got vargrad"),
        ([], "--problem must be given, got none; pass --problem NAME (see --list) or --all"),
        (["--objective", "vargrad"], "--problem must be given"),
        (["--all", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["--all", "--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--problem", NAMES[0], "--steps", "0"], "steps must be >= 1, got 0"),
        (["--problem", NAMES[0], "--set", "seed=3"], "seed must be omitted"),
        (["--problem", NAMES[0], "--set", "objective=vargrad"], "got 'vargrad'; use --objective"),
        (["--problem", NAMES[0], "--set", "conditioning=adapter_scale"], "conditioning must be omitted"),
        (
            ["--problem", "tiny-cold", "--set", "reward_temperature=[1.0, 0.9]"],
            "reward_temperature must be [T, 0.5], got [1.0, 0.9]; let the schedule end there",
        ),
        (
            ["--problem", "tiny-cold", "--objective", "rtb", "--set", "reward_temperature=[1.0, 0.5]"],
            "must be [T, 1.0]",
        ),
        (
            ["--problem", NAMES[0], "--objective", "rtb", "--set", "rtb_beta=2"],
            "rtb_beta must be 1.0 with rtb, got 2",
        ),
        (["--problem", NAMES[0], "--stop-at", "0"], "--stop-at must be in (0, 1], got 0"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(small, capsys, tmp_path, args, message):
    code, _, error = small(capsys, *args, "--output", "lab")
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_presets_are_settings(problem):
    for name in presets.BEHAVIORS:
        runs.TrainConfig.from_dict(presets.settings("tiny", "modified_subtb", name))
    for name in presets.OBJECTIVES:
        runs.TrainConfig.from_dict(presets.settings("smollm2-135m", name, "default"))


@pytest.mark.parametrize("model", presets.BY_MODEL)
@pytest.mark.parametrize("behavior", presets.BEHAVIORS)
def test_every_objective_has_as_many_trajectories(model, behavior):
    made = [presets.settings(model, name, behavior) for name in presets.OBJECTIVES]
    assert len({s["steps"] for s in made}) == 2
    drawn = [s["num_samples"] + s.get("local_search_samples", (0, 0))[1] for s in made]
    assert len({s["steps"] * num for s, num in zip(made, drawn, strict=True)}) == 1
    assert len({s["epsilon_horizon"] / s["steps"] for s in made}) == 1
