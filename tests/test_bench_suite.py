"""The op benches: no provider is lost or trusted, rows keep their provenance, tables say what is missing."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import rows
import suite
import tables
import test_bench_attention as attention
import test_bench_draw as draw
import test_bench_head as head
import test_bench_path_attention as path_attention
import test_bench_subtb as subtb
import torch
import torch.nn.functional as F

from fastgfn.reference import attention as attention_reference
from fastgfn.reference import subtb as subtb_reference

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "head": head,
    "subtb": subtb,
    "attention": attention,
    "draw": draw,
    "path_attention": path_attention,
}
SHORT = [case for module in MODULES.values() for case in module.BENCH.cases("cpu", "short")]


def without_compilers(bench: suite.Bench) -> suite.Bench:
    # A compilation takes longer than all the rest; `pytest bench` has them.
    slow = [name for name in bench.providers if "compile" in name]
    return bench._replace(providers={n: p for n, p in bench.providers.items() if n not in slow})


@pytest.fixture
def case():
    return head.cases("cpu", "short")[1]


@pytest.fixture
def only(case):
    """The head bench with the given providers beside fastgfn, prepared."""

    def prepare(**providers):
        bench = head.BENCH._replace(providers={"fastgfn": head.BENCH.providers["fastgfn"], **providers})
        return bench, suite.prepare(bench, case, head.make_inputs(case))

    return prepare


@pytest.mark.parametrize("case", SHORT, ids=lambda c: f"{c.bench}-{c}")
def test_every_provider_is_right_or_says_why_it_is_absent(case):
    bench = without_compilers(MODULES[case.bench].BENCH)
    prepared = suite.prepare(bench, case, bench.make_inputs(case))
    assert list(prepared.status) == list(bench.providers)
    for name, status in prepared.status.items():
        assert status == "ok" or status.startswith("not available: "), (name, status)
        assert (status == "ok") == (name in prepared.runs)
    assert prepared.status["fastgfn"] == "ok"


def test_the_fair_composition_equals_the_reference_to_rounding(case):
    def plain(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    inputs = head.make_inputs(case)
    result = head.step(case, inputs, head.fair(plain)).run()
    assert case.mode == "fwd+dH" and len(result) == 4
    assert head.error(case, inputs, result, head.truth(case, inputs)) < 2e-6


def test_confident_and_unlikely_targets_are_both_there(case):
    log_pf = head.truth(case, head.make_inputs(case))[0]
    assert float(log_pf.max()) > -0.01 and float(log_pf.min()) < -6


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda out: (out[0] * (1 + 1e-3), *out[1:]), "wrong: off by 0.001"),
        (lambda out: (out[0], out[0], *out[2:]), "wrong: off by "),
        (lambda out: (out[0] * float("nan"), *out[1:]), "wrong: off by nan"),
    ],
)
def test_a_wrong_rival_is_named_and_not_timed(only, spoil, status):
    def rival(case, inputs):
        right = head.step(case, inputs, head.eager)
        return suite.Step(lambda: spoil(right.run()))

    bench, prepared = only(rival=suite.Provider(rival))
    assert prepared.status["rival"].startswith(status) and list(prepared.runs) == ["fastgfn"]


def test_a_wrong_gradient_alone_is_enough(only):
    def rival(case, inputs):
        # The gradient of the token's log-prob without that of the stop's.
        scaled = inputs._replace(upstream=(inputs.upstream[0], 0 * inputs.upstream[1]))
        return head.step(case, scaled, head.eager)

    _, prepared = only(rival=suite.Provider(rival))
    assert prepared.status["rival"].startswith("wrong")


def test_a_wrong_or_broken_fastgfn_fails_the_case_and_leaves_the_others(only):
    def wrong(case, inputs):
        return head.step(case, inputs, lambda h, w, t: tuple(x + 0.01 for x in head.fastgfn(h, w, t)))

    def broken(case, inputs):
        raise RuntimeError("no such kernel")

    for provider, kind, status in (
        (wrong, suite.Wrong, "wrong: off by"),
        (broken, RuntimeError, "failed: RuntimeError: no such kernel"),
    ):
        _, prepared = only(fastgfn_new=suite.Provider(provider))
        assert type(prepared.failure) is kind and list(prepared.runs) == ["fastgfn"]
        assert prepared.status["fastgfn_new"].startswith(status)
    assert only()[1].failure is None


def test_missing_and_crashing_rivals_are_named(only):
    def missing(case, inputs):
        import no_such_package  # noqa: F401

    def crash(case, inputs):
        return suite.Step(lambda: 1 // 0)

    bench, prepared = only(missing=suite.Provider(missing), crash=suite.Provider(crash))
    assert prepared.status["missing"] == "not available: No module named 'no_such_package'"
    assert prepared.status["crash"].startswith("failed: ZeroDivisionError: integer division")


def test_a_row_for_every_provider_and_the_ratio_to_the_gemm_of_the_same_round(only, case):
    def absent(case, inputs):
        raise suite.NotAvailable("needs CUDA")

    bench, prepared = only(gemm=head.BENCH.providers["gemm"], absent=suite.Provider(absent))
    times = {"fastgfn": [2.0, 6.0, 30.0], "gemm": [1.0, 2.0, 10.0]}
    peaks = {"fastgfn": harness.PeakMemory(10, 30)}
    found = {r["provider"]: r for r in suite.make_rows(bench, case, prepared, times, None, peaks)}
    assert list(found) == ["fastgfn", "gemm", "absent"]
    assert found["fastgfn"]["ms_p50"] == 6.0 and found["fastgfn"]["of_gemm"] == 3.0
    assert (found["fastgfn"]["baseline_bytes"], found["fastgfn"]["peak_bytes"]) == (10, 30)
    assert found["gemm"]["of_gemm"] == 1.0 and found["gemm"]["error"] == ""
    assert found["absent"]["ms_p50"] == "" and found["absent"]["status"] == "not available: needs CUDA"
    assert found["fastgfn"]["tflop_per_s"] == float(f"{4 * 64 * 64 * 1000 / 6e9:.4g}")
    assert len({tuple(r) for r in found.values()}) == 1
    text = suite.describe(list(found.values()))
    assert "absent: not available: needs CUDA" in text and "3.00 of gemm" in text


def test_turns_are_rotated_and_counted():
    called = []
    steps = {name: (lambda n=name: called.append(n)) for name in "abc"}
    times = harness.time_interleaved(steps, repeats=3, warmup=1)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def report(*infos):
    return {"benchmarks": [{"name": "test", "extra_info": info} for info in infos]}


def test_rows_keep_the_provenance_of_the_run_that_measured_them(tmp_path):
    stamp = harness.provenance() | {"date": "2026-01-02T03:04Z", "commit": "abc", "dirty": 0}
    info = {"bench": "head", "provenance": stamp, "rows": [{"provider": "a", "ms_p50": 1.5, "status": "ok"}]}
    other = info | {"rows": [{"provider": "b", "ms_p50": "", "status": "failed: x, y"}]}
    (path,) = rows.convert(report(info, other), tmp_path)
    assert path == tmp_path / "head.csv"
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*harness.provenance(), "provider", "ms_p50", "status"]
    assert [r["provider"] for r in found] == ["a", "b"] and found[1]["status"] == "failed: x, y"
    assert all(r["date"] == "2026-01-02T03:04Z" and r["commit"] == "abc" for r in found)


def test_new_columns_extend_an_older_file_and_others_are_refused(tmp_path):
    stamp = {"date": "today"}
    path = harness.append_rows("x", [{"provider": "a"}], stamp, tmp_path)
    harness.append_rows("x", [{"provider": "b", "status": "ok"}], stamp, tmp_path)
    assert path.read_text() == "date,provider,status\ntoday,a,\ntoday,b,ok\n"
    for row in ({"other": "c", "status": "ok"}, {"provider": "c"}):
        with pytest.raises(ValueError, match="columns must begin with"):
            harness.append_rows("x", [row], stamp, tmp_path)
    with pytest.raises(ValueError, match="every row must have columns"):
        harness.append_rows("x", [{"provider": "c"}, {"status": "ok"}], stamp, tmp_path)


def test_a_case_without_rows_is_refused_once_the_others_are_kept(tmp_path):
    stamp = {"date": "2026-01-02T03:04Z", "commit": "abc", "dirty": 0}
    info = {"bench": "head", "provenance": stamp, "rows": [{"provider": "a", "status": "ok"}]}
    with pytest.raises(ValueError, match="must have rows in extra_info"):
        rows.convert(report({}, info), tmp_path)
    assert (tmp_path / "head.csv").read_text().endswith("2026-01-02T03:04Z,abc,0,a,ok\n")


def test_a_case_that_fails_has_the_rows_of_its_other_providers(tmp_path):
    """What breaks is on a GPU only: one of ours, and the process that measures a peak."""
    (tmp_path / "test_bench_broken.py").write_text(
        "import test_bench_subtb as subtb\n"
        "from suite import Provider\n"
        "def broken(case, inputs):\n"
        "    raise RuntimeError('no such kernel')\n"
        "ours = {n: subtb.BENCH.providers[n] for n in ('fastgfn', 'window_loop')}\n"
        "BENCH = subtb.BENCH._replace(providers=ours | {'fastgfn_op': Provider(broken)})\n"
        "def test_broken(case, measure):\n"
        "    measure(BENCH, case)\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    out = tmp_path / "out.json"
    # peak.py is not there
    flags = [
        "--benchmark-only",
        f"--benchmark-json={out}",
        "--rounds=1",
        "--peak=cpu",
        "-p",
        "no:cacheprovider",
    ]
    path = os.pathsep.join([str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    keep = os.environ | {"PYTHONPATH": path}
    argv = [Path(sys.executable).parent / "pytest", "--rootdir", tmp_path, tmp_path, *flags]
    done = subprocess.run(argv, cwd=tmp_path, env=keep, capture_output=True, text=True)
    assert done.returncode == 1 and "no such kernel" in done.stdout, done.stdout + done.stderr
    found = {
        r["provider"]: r for b in json.loads(out.read_text())["benchmarks"] for r in b["extra_info"]["rows"]
    }
    assert found["fastgfn_op"]["status"] == "failed: RuntimeError: no such kernel"
    assert found["fastgfn"]["ms_p50"] > 0 and found["window_loop"]["peak_bytes"] == ""


def test_the_new_rows_extend_the_committed_ones():
    for path in harness.RESULTS.glob("*/*.csv"):
        if path.stem not in MODULES:
            continue
        bench = MODULES[path.stem].BENCH
        case = bench.cases("cpu", "short")[0]
        prepared = suite.Prepared({}, dict.fromkeys(bench.providers, ""), dict.fromkeys(bench.providers, ""))
        new = [*harness.provenance(), *suite.make_rows(bench, case, prepared, {})[0]]
        have = path.read_text().split("\n", 1)[0].split(",")
        assert have == new[: len(have)], path


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_every_case_is_known_by_its_id_and_has_work(module):
    for device in ("cpu", "cuda"):
        for shapes in ("short", "full"):
            found = module.BENCH.cases(device, shapes)
            assert found and len({str(c) for c in found}) == len(found)
            assert all(min(module.BENCH.work(c)) > 0 for c in found)


def test_the_truth_of_subtb_is_all_pairs():
    case = subtb.cases("cpu", "short")[0]
    log_pf, log_flow, lengths = subtb.make_inputs(case)
    wide = log_pf.double(), log_flow.double(), lengths
    for a, b in zip(subtb.closed_form(*wide, 1.0), subtb_reference.subtb_padded(*wide, 1.0), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_the_truth_of_path_attention_is_the_reference():
    """Also with rows below two prompts, which share two tiles."""
    case = path_attention.cases("cpu", "short")[0]
    inputs = path_attention.make_inputs(case)
    layer = [x[1].double() for x in inputs[:3]]
    want = attention_reference.path_attention(*layer, inputs.path, inputs.length, scale=case["d"] ** -0.5)
    assert torch.allclose(path_attention.truth(case, inputs)[1], want, atol=1e-12)
    assert inputs.shared.tiles[:, :4].tolist() == [[0, 1, 2, -1], [3, 4, 5, -1], [-1] * 4]


def test_the_truth_of_attention_is_the_reference():
    case = attention.cases("cpu", "short")[0]
    inputs = attention.make_inputs(case)
    tensors = [x.double() for x in inputs[:3]]
    scale = case["d"] ** -0.5
    want = attention_reference.tree_attention(*tensors, inputs.end, inputs.position, scale=scale)
    assert torch.allclose(attention.truth(case, inputs)[0], want, atol=1e-12)


def test_draws_from_another_distribution_are_refused():
    case = draw.cases("cpu", "short")[0]
    inputs = draw.make_inputs(case)
    truth = draw.truth(case, inputs)
    at_one, tempered = draw.log_probs(inputs.make_logits(), inputs.bias)
    drawn = draw.read(at_one, tempered, torch.multinomial(tempered.exp(), 1)[:, 0])
    assert draw.error(case, inputs, drawn, truth) < 1e-5
    greedy = draw.read(at_one, tempered, tempered.argmax(-1))
    assert draw.error(case, inputs, greedy, truth) == float("inf")
    swapped = drawn[0], drawn[3], drawn[2], drawn[1]
    assert draw.error(case, inputs, swapped, truth) > 1e-3


def test_tables_show_ratios_of_one_run_and_say_what_was_not_measured(tmp_path, monkeypatch):
    case = head.cases("cpu", "full")[0]
    stamp = {"date": "2026-01-01", "commit": "abc", "dirty": 0, "device": "CPU x2"}
    line = {"mode": case.mode, "dtype": case.dtype, **dict(case.sizes), "baseline_bytes": 2**20}
    empty = dict.fromkeys(("ms_p50", suite.DEVICE_TIME, "of_gemm", "peak_bytes"), "")
    found = [
        {"provider": "fastgfn", **line, **empty, "ms_p50": 10.0, "of_gemm": 1.5, "peak_bytes": 9 * 2**20},
        {"provider": "eager", **line, **empty, "ms_p50": 25.0},
        {"provider": "cce", **line, **empty},
    ]
    for row in found:
        row["status"] = "ok" if row["ms_p50"] else "not available: needs CUDA"
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.append_rows("head", found, stamp, tmp_path / "cpu-x2")
    lines = tables.op("head").splitlines()
    shape = " | ".join(str(v) for v in dict(case.sizes).values())
    assert lines[2] == f"| CPU | fwd | float32 | {shape} | 10 ms | 8 MiB | 1.50 | 2.50x |"
    count = len(head.cases("cpu", "full")) + len(head.cases("cuda", "full"))
    assert sum("not measured" in text for text in lines) == count - 1
    assert all(
        text.endswith("| not measured | not measured | not measured | not measured |") for text in lines[3:-2]
    )
    assert "cce (CPU): not available: needs CUDA" in lines[-1] and "CPU x2, commit abc" in lines[-1]


def test_the_random_integer_table_names_the_origin_of_every_row(tmp_path, monkeypatch):
    numbers = ("kl_target_to_model", "kl_model_to_target", "tv", "invalid_mass", "log_z_error")
    for i, (terminator, penalty) in enumerate((("newline", "16.0"), ("eos", "16.0"), ("newline", "18.0"))):
        line = {"model": "smollm2-135m", "weights": "4-bit", "terminator": terminator, "penalty": penalty}
        line |= {"lora_rank": "32", "seed": 0, "steps": 5, "seconds": 1.0}
        line |= {f"before_{k}": i + 1.0 for k in numbers} | {f"after_{k}": i + 0.5 for k in numbers}
        stamp = {"date": f"2026-01-0{i + 1}", "commit": f"{i}" * 12, "dirty": 0, "device": "CPU x2"}
        harness.append_rows("rng", [line], stamp, tmp_path / "cpu-x2")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = tables.rng()
    lines = text.splitlines()
    assert lines[2] == "| newline | 0 | 0.5 | 0.5 | 0.5 | 0.5 | 0.5 | 5 | 1 | 0000000 |"
    assert lines[3] == "| eos | 0 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | 5 | 1 | 1111111 |"
    assert "2.5" not in text, "another target is another table"
    assert "Before training, newline: `invalid_mass` 1, " in text
    assert "Before training, eos: `invalid_mass` 2, " in text


def test_pytest_bench_ends_in_rows(tmp_path):
    """The command of the Makefile on one case, then the conversion, outside of this process."""
    out = tmp_path / "out.json"
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    pytest_script = Path(sys.executable).parent / "pytest"
    argv = [pytest_script, "bench/test_bench_attention.py", "-k", "cpu-fwd-float32", "--rounds", "2"]
    flags = ["-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={out}"]
    done = subprocess.run([*argv, *flags], cwd=ROOT, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flex: not available: needs CUDA" in done.stdout and "sdpa_unshared:" in done.stdout
    (entry,) = json.loads(out.read_text())["benchmarks"]
    assert {len(ms) for ms in entry["extra_info"]["ms"].values()} == {2}
    rows.convert(json.loads(out.read_text()), tmp_path)
    with (tmp_path / "attention.csv").open(newline="") as file:
        found = {r["provider"]: r for r in csv.DictReader(file)}
    assert list(found) == list(attention.BENCH.providers)
    assert float(found["fastgfn"]["ms_p50"]) > 0 and found["fastgfn"]["repeats"] == "2"
