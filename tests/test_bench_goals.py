"""The goals on a GPU: no provider, goal or process takes the rows of another with it."""

import subprocess
import sys
import time
from pathlib import Path

import bench_gpu_rollout as rollout
import bench_gpu_step as step
import contest
import goals
import harness
import pytest
import suite
import tables
import test_bench_path_attention as path_attention
import torch

from fastgfn.models import random_policy
from fastgfn.models.shapes import SHAPES
from fastgfn.throughput import tree_work
from fastgfn.types import Constraints

CPU = torch.device("cpu")
STAMP = {"commit": "abc", "dirty": 0, "device": "NVIDIA H200"}


def entry(error=0.0, fail_at=None):
    def run(i):
        if i == fail_at:
            raise RuntimeError("CUDA error: an illegal memory access")
        return 8.0

    return contest.Entry(run, lambda: error, tolerance=1e-3)


def raises(error):
    def make():
        raise error

    return make


def test_whatever_a_provider_does_the_others_are_timed():
    found = contest.contest(
        {
            "wrong": lambda: entry(error=0.5),
            "nan": lambda: entry(error=float("nan")),
            "absent": raises(suite.NotAvailable("needs CUDA")),
            "missing": raises(ImportError("no module")),
            "large": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")),
            "inductor": raises(RuntimeError("backend raised: CUDA out of memory.")),
            "breaks": lambda: entry(fail_at=0),
            "breaks later": lambda: entry(fail_at=3),
            "fastgfn": lambda: entry(),
        },
        rounds=3,
        device=CPU,
    )
    status = {name: c.status for name, c in found.items()}
    assert status["wrong"] == "wrong: off by 0.5, more than 0.001" and status["nan"].startswith("wrong: off")
    assert status["absent"] == "not available: needs CUDA" and status["missing"] == "not available: no module"
    assert status["large"] == status["inductor"] == "out of memory"
    assert status["breaks"] == status["breaks later"]
    assert status["breaks"] == "failed: RuntimeError: CUDA error: an illegal memory access"
    assert found["fastgfn"].is_timed and len(found["fastgfn"].ms) == 3
    assert [name for name, c in found.items() if c.is_timed] == ["fastgfn"]
    assert contest.ratios(found) == {}
    rows = contest.make_rows(found, {}, item="token", packages={"absent": "torch"}, goal="D1", case="n=1")
    assert [r["provider"] for r in rows] == list(found) and {tuple(r) for r in rows} == {
        tuple(goals.columns())
    }
    assert all((r["ms_p50"] != "") == (r["provider"] == "fastgfn") for r in rows)
    assert (
        rows[2]["version"] == torch.__version__ and rows[-1]["peak_bytes"] >= rows[-1]["baseline_bytes"] > 0
    )


def test_the_ratio_is_that_of_median_speeds():
    found = {
        "fastgfn": contest.Contestant(ms=[2.0, 1.0, 4.0], items=[20, 20, 20]),
        "rival": contest.Contestant(ms=[10.0, 20.0, 5.0], items=[10, 10, 30]),
    }
    assert contest.ratios(found) == {"rival": 10.0}
    (_, row) = contest.make_rows(found, contest.ratios(found), item="token", packages={}, goal="D1")
    assert row["items_per_s"] == 1000 and row["value"] == 10 and row["rounds"] == 3 and row["ms_p50"] == 10
    assert "value 10" in contest.describe(row) and "1000.0 tokens/s" in contest.describe(row)
    found["fastgfn"].status = "wrong: off by 1"
    assert contest.ratios(found) == {}


def test_without_time_one_provider_and_one_round_are_left():
    makers = {"fastgfn": entry, "rival": entry}
    found = contest.contest(makers, rounds=3, device=CPU, seconds=lambda: -1.0)
    assert len(found["fastgfn"].ms) == 1
    assert found["rival"].status == "skipped: no time left" and not found["rival"].is_timed


def test_a_goal_that_raises_leaves_the_next_its_rows(tmp_path):
    def broken(goal, setting, run):
        raise RuntimeError("a bug")

    def works(goal, setting, run):
        run.write([goals.blank_row(goal=goal, provider="fastgfn", status="ok", rounds=run.rounds)])
        return True

    loaded = []
    setting = rollout.Setting("tiny", (2,), 3, (4,))
    plan = contest.Plan(
        full={},
        dry={"D1": setting, "D4": setting, "D6": setting._replace(model="none")},
        measure={"D1": broken, "D4": works, "D6": works},
        load=lambda model, dtype, device: loaded.append(model) or {"tiny": "a policy"}[model],
    )
    assert not contest.run_goals(plan, ["D1", "D6", "D4"], tmp_path, 60, dry=True)
    found = goals.measured(tmp_path / "goals.csv")
    assert [(r["goal"], r["status"]) for r in found] == [
        ("D1", "failed: RuntimeError: a bug"),
        ("D6", "failed: KeyError: 'none'"),
        ("D4", "ok"),
    ]
    assert loaded == ["tiny", "none", "tiny"]


def test_a_process_that_hangs_or_dies_is_a_row(tmp_path, monkeypatch):
    """With all that it has started: a compiler's worker keeps the GPU's memory."""
    script = tmp_path / "bench_gpu_rollout.py"
    left = tmp_path / "left"
    script.write_text(
        "import subprocess, sys, time\n"
        "if 'D5' in sys.argv[2]: sys.exit(3)\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 4; touch {left}'])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(goals, "__file__", str(tmp_path / "goals.py"))
    monkeypatch.setattr(goals, "LEAST", 0)
    assert goals.run_group("rollout", ("D5",), tmp_path, 1.0, 60.0, False) == "failed: ended with 3"
    monkeypatch.setitem(goals.GROUPS, "rollout", (goals.Group(("D1", "D4"), 1.0),))
    monkeypatch.setattr(sys, "argv", ["goals.py", "rollout", "--out", str(tmp_path), "--budget", "2"])
    start = time.monotonic()
    with pytest.raises(SystemExit, match="1"):
        goals.main()
    found = goals.measured(tmp_path / "goals.csv")
    assert [(r["goal"], r["status"]) for r in found] == [
        ("D1", "failed: ended after 2 s"),
        ("D4", "failed: ended after 2 s"),
    ]
    time.sleep(max(0, start + 6 - time.monotonic()))
    assert not left.exists()


def test_every_goal_is_planned_and_grouped():
    grouped = [goal for groups in goals.GROUPS.values() for group in groups for goal in group.goals]
    assert sorted((*grouped, *goals.OP_GOALS)) == sorted(goals.GOALS)
    for plan, letter in ((rollout.PLAN, "D"), (step.PLAN, "S")):
        own = sorted(g for g in grouped if g[0] == letter)
        assert sorted(plan.full) == sorted(plan.dry) == sorted(plan.measure) == own
        assert all(s.model in SHAPES for s in (*plan.full.values(), *plan.dry.values()))
    for group in (group for groups in goals.GROUPS.values() for group in groups):
        plan = rollout.PLAN if group.goals[0] in rollout.PLAN.full else step.PLAN
        assert len({plan.full[goal].model for goal in group.goals}) == 1


def test_the_dry_run_measures_every_goal(tmp_path):
    """Also that the samplers' log q and the steps' gradients are right: one that is off has no time."""
    torch.set_num_threads(1)
    for plan in (rollout.PLAN, step.PLAN):
        assert contest.run_goals(plan, list(plan.dry), tmp_path, 300, dry=True)
    rows = goals.measured(tmp_path / "goals.csv")
    absent = {"continuous_async": "not available: needs CUDA"}
    assert all(r["status"] == absent.get(r["provider"], "ok") for r in rows)
    assert {r["goal"] for r in rows} == set(goals.GOALS) - set(goals.OP_GOALS)
    providers = {"fastgfn", "generate", "static", "static_tokens", "continuous", "published", "padded"}
    assert {r["provider"] for r in rows if r["ms_p50"]} == providers
    timed = [r for r in rows if r["ms_p50"] and r["case"] != "best"]
    unchecked = [(r["goal"], r["provider"], r["case"]) for r in timed if not r["error"]]
    # it returns no log q; and further sizes of what was checked
    assert sorted(unchecked) == [
        ("D2", "static_tokens", "n=3"),
        ("S3", "fastgfn", "n=6"),
        ("S3", "published", "n=5"),
    ]
    assert max(float(r["error"] or 0) for r in rows) < 1e-3
    assert all(int(r["peak_bytes"]) >= int(r["baseline_bytes"]) > 0 for r in rows if r["ms_p50"])
    # a step's time is a difference of two, which a busy machine may lose
    for goal in {r["goal"] for r in rows} - {"D4", "D5", "D6"}:
        assert any(float(r["value"] or -1) >= 0 for r in rows if r["goal"] == goal), goal


@pytest.fixture(scope="module")
def policy():
    return rollout.load("tiny", torch.float32, CPU)


def run_of(policy):
    return contest.Run(policy, "fp32", 2, lambda: 60.0, lambda rows: None)


def test_log_q_that_is_off_is_seen(policy):
    limits = Constraints(511, max_length=6)
    own = rollout.Ours(run_of(policy), [1, 2, 3], limits, 4)
    own(0)
    drawn = own.last
    assert own.error() < 1e-5
    for n in range(4):
        other = drawn.log_pf.clone()
        other[n, max(int(drawn.lengths[n]) - 1, 0)] += 0.01
        assert rollout.log_q_error(policy, drawn, other, drawn.log_pterm) == pytest.approx(0.01, abs=1e-4)
    stop = drawn.log_pterm.clone()
    stop[2, 0] -= 0.01
    assert rollout.log_q_error(policy, drawn, drawn.log_pf, stop) == pytest.approx(0.01, abs=1e-4)


def test_the_rivals_model_is_a_copy_with_the_adapter(policy):
    tokens = torch.arange(1, 9)[None]
    with policy.plain() as model, torch.no_grad():
        want = model(input_ids=tokens).logits
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
    assert float((want - base).abs().max()) > 1e-4
    beside, merged = rollout.plain_copy(policy), rollout.plain_copy(policy, merge=True)
    for own in (beside, merged):
        with torch.no_grad():
            assert torch.allclose(own(input_ids=tokens).logits, want, atol=1e-5)
        assert not {p.data_ptr() for p in own.parameters()} & {
            p.data_ptr() for p in policy.model.parameters()
        }
        assert own.config._attn_implementation == "sdpa"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert policy.config._attn_implementation == "fastgfn"


def test_the_bytes_of_a_step_are_those_of_the_throughput_report(policy):
    from fastgfn.packing import pack

    sizes = step.Sizes("tiny", 1, 4, 9, 5)
    task = step.Task(run_of(policy), sizes, "forced")
    tree = pack(task.given(4, ragged=False))
    work = tree_work(policy, tree)
    # the tree's decoding: 4 passes, the sequences 1 to 4 tokens long; each pass reads the head besides
    passes = sum(rollout.step_bytes(policy, 9, 4, own) for own in (1, 2, 3, 4))
    head = policy.head.weight.numel() * policy.head.weight.element_size()
    assert passes == pytest.approx(work["decode"].num_bytes + 4 * head, rel=1e-6)


def test_a_wrong_step_is_refused(policy):
    sizes = step.Sizes("tiny", 1, 4, 9, 5)
    task = step.Task(run_of(policy), sizes, "forced")
    learn = task.learn
    right = step.ours(task, 4, task.given(4, ragged=False))
    assert right.error() < right.tolerance
    task.learn = lambda given: learn(given) * 1.01
    assert step.ours(task, 4, task.given(4, ragged=False)).error() == pytest.approx(0.01, rel=0.1)
    task.learn = lambda given: learn(given) and learn(given)
    # twice the gradients
    assert step.ours(task, 4, task.given(4, ragged=False)).error() == pytest.approx(1.0, rel=0.01)


def test_busy_time_is_counted_once():
    assert step.union_length([(5, 7), (0, 2), (1, 3), (6, 6.5), (7, 8)]) == 6
    assert step.union_length([]) == 0


def test_gpt2_shapes_are_gpt2():
    policy = random_policy("gpt2-tiny", lora_rank=2)
    assert policy.config.model_type == "gpt2" and policy.vocab_size == 509
    layers, width, heads, vocab = SHAPES["gpt2-xl"]
    assert (layers, width, width // heads, vocab) == (48, 1600, 64, 50257)
    assert (
        policy.model.get_base_model().lm_head.weight is policy.model.get_base_model().transformer.wte.weight
    )


def write(folder, rows, **stamp):
    harness.append_rows("goals", rows, STAMP | stamp, folder / "h200")


def test_the_table_of_goals_says_what_was_and_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    lines = tables.goal_table().splitlines()
    assert len(lines) == 2 + len(goals.GOALS) and all(line.endswith("| not measured |") for line in lines[2:])

    def row(goal, case, provider, value="", status="ok", **known):
        return goals.blank_row(goal=goal, case=case, provider=provider, value=value, status=status, **known)

    write(
        tmp_path,
        [
            row("D1", "n=64", "fastgfn"),
            row("D1", "n=64", "generate", 9.0),
            row("D1", "n=20", "fastgfn"),
            row("D1", "n=20", "generate", status="out of memory"),
            row("D3", "n=64", "fastgfn"),
            row("D3", "n=64", "continuous", 3.21, note="paged|sdpa"),
            row("D3", "n=64", "continuous_async", 2.5, note="paged|sdpa"),
            row("D4", "n=64", "fastgfn", 0.5123),
            row("S6", "x", "fastgfn", 0.2),
            goals.blank_row(goal="S1", status="failed: ended after 90 s"),
            goals.blank_row(goal="S2", status="failed: ended after 90 s"),
        ],
        date="2026-01-01T00:00Z",
    )
    write(
        tmp_path,
        [row("D1", "n=64", "generate", 17.0), row("S2", "n=20", "published", 15.0)],
        date="2026-01-02T00:00Z",
    )
    # neither a dirty tree nor a dry run nor a CPU counts
    write(tmp_path, [row("D4", "n=64", "fastgfn", 0.8, dtype="fp32")], date="2026-01-03T00:00Z")
    write(tmp_path, [row("D4", "n=64", "fastgfn", 0.9)], date="2026-01-03T00:00Z", dirty=1)
    write(tmp_path, [row("S5", "x", "fastgfn", 0.9)], date="2026-01-03T00:00Z", device="AMD EPYC x2")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in
             tables.goal_table().splitlines()}  # fmt: skip
    assert cells["D1"] == "n=64: 17x; n=20: generate out of memory"
    assert cells["D3"] == "n=64: 2.5x (continuous_async, paged/sdpa)"
    assert cells["D4"] == "n=64: 51.2%" and cells["S6"] == "x: 20%" and cells["S5"] == "not measured"
    assert cells["S1"] == "failed: ended after 90 s" and cells["S2"] == "n=20: 15x"
    assert "NVIDIA H200, commit abc" in tables.goal_table()


def test_shared_prompts_are_held_to_the_best_that_reads_every_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    bench = path_attention.BENCH
    ms = {"fastgfn": 2.0, "fastgfn_unshared": 8.0, "sdpa_unshared": 6.0, "sdpa_pairs": 1.0}
    for case in bench.cases("cuda", "full"):
        status = dict.fromkeys(ms, "ok") | ({"fastgfn": "failed: a bug"} if case["Hkv"] == 25 else {})
        times = {name: [x] for name, x in ms.items() if status[name] == "ok"}
        rows = suite.make_rows(bench, case, suite.Prepared({}, status, dict.fromkeys(ms, "")), times, times)
        stamp = STAMP | {"date": "2026-01-01T00:00Z"}
        harness.append_rows("path_attention", rows, stamp, tmp_path / "h200")
    (cell,) = [x for x in tables.goal_table().splitlines() if x.startswith("| D8 |")]
    same = "G 1, H 32, Hkv 8, d 128: 3x (sdpa_unshared); G 1, H 32, Hkv 8, d 64: 3x (sdpa_unshared)"
    last = "G 16, H 32, Hkv 8, d 64: 3x (sdpa_unshared); G 1, H 25, Hkv 25, d 64: fastgfn failed: a bug"
    assert cell.endswith(f"| >= 2x | >= 4x | {same}; {last} |")
    assert "| GPU | decode | bfloat16 | 8 | 256 | 16 | 200 | 30 |" in tables.op("path_attention")


def test_the_readme_has_a_table_of_every_bench():
    text = (harness.ROOT / "README.md").read_text()
    names = sorted(
        x.stem.removeprefix("test_bench_") for x in (harness.ROOT / "bench").glob("test_bench_*.py")
    )
    assert names == sorted(tables.OPS) and all(f"<!-- begin {name} -->" in text for name in names)


def test_the_runner_skips_what_has_no_time(tmp_path):
    script = Path(goals.__file__)
    argv = [sys.executable, str(script), "step", "--out", str(tmp_path), "--budget", "5"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["S1, S6, S2", "S4, S5", "S3"]
    assert not (tmp_path / "goals.csv").exists()


def best_of(policy, monkeypatch, status, seconds=lambda: 60.0):
    """The rows of S3 where the published loop ends so at its second size."""

    def contest_of(self, providers, rounds=None):
        (name,) = providers
        made.append(name)
        if made.count("published") == 2:
            return {name: contest.Contestant(status)}
        speed = 40.0 if name == "fastgfn" else 10.0
        return {name: contest.Contestant(ms=[100.0 / made.count(name)], items=[speed])}

    made, rows = [], []
    monkeypatch.setattr(contest.Run, "contest", contest_of)
    run = contest.Run(policy, "fp32", 1, seconds, rows.extend)
    assert step.best_batch("S3", step.Sizes("tiny", 1, 4, 9, 5, (4, 6), (4, 5, 7)), run)
    return [(r["case"], r["provider"], r["value"], r["status"]) for r in rows]


def test_the_best_batch_is_of_sizes_that_were_tried(policy, monkeypatch):
    sizes = [("n=4", "fastgfn", "", "ok"), ("n=6", "fastgfn", "", "ok"), ("n=4", "published", "", "ok")]
    rows = best_of(policy, monkeypatch, "out of memory")
    assert rows[:3] == sizes and rows[3] == ("n=5", "published", "", "out of memory")
    # 800 samples/s at n=6 against 100
    assert rows[4:] == [("best", "published", 8.0, "ok")]
    left = iter([1.0, -1.0, -1.0])
    rows = best_of(policy, monkeypatch, "failed: a bug", seconds=lambda: next(left))
    skipped = "skipped: no time left"
    assert rows == [*sizes, ("n=5", "published", "", skipped), ("n=7", "published", "", skipped)]


def test_a_manager_that_cannot_be_stopped_loses_no_rows(capsys):
    with rollout.closing() as block:
        block.callback(lambda: 1 // 0)
    assert "closing: integer division" in capsys.readouterr().out
    with pytest.raises(KeyError), rollout.closing() as block:
        raise KeyError
