"""Options and the `measure` fixture of the op benches: `pytest bench --benchmark-only [--shapes full]`."""

import time
from pathlib import Path

import harness
import pytest
import suite
import torch

# Fewest and most timed rounds of a case, between which they fill about a minute.
ROUNDS = {"short": (5, 5), "full": (5, 25)}
CASE_MS = 60e3
RESULTS = pytest.StashKey[list]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("fastgfn benches")
    group.addoption("--shapes", choices=list(ROUNDS), default="short", help="short runs anywhere in minutes")
    group.addoption("--rounds", type=int, help="timed rounds of a case, default 5 (short), 5 to 25 (full)")
    group.addoption("--budget", type=float, help="seconds after which the cases that are left are skipped")
    group.addoption("--peak", help="also peak memory, in the cases whose id contains this text")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.stash[STARTED] = time.monotonic()


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cases = metafunc.module.BENCH.cases(device, metafunc.config.getoption("shapes"))
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def measure(benchmark, request):
    """measure(bench, case): check every provider, time the right ones in turns, attach the rows.

    pytest-benchmark drives the rounds, and its own statistics are those of one round of all providers; the
    figures of a provider are in extra_info, from where rows.py takes them.
    """

    def run(bench: suite.Bench, case: suite.Case) -> list[dict]:
        budget = request.config.getoption("budget")
        if budget is not None and time.monotonic() - request.config.stash[STARTED] > budget:
            pytest.skip(f"the budget of {budget:.0f} s is spent")
        # What earlier cases compiled counts towards a limit of versions per function.
        torch.compiler.reset()
        inputs = bench.make_inputs(case)
        prepared = suite.prepare(bench, case, inputs)
        if prepared.failure is not None and not prepared.runs:
            raise prepared.failure
        turns = harness.Turns(prepared.runs)
        turns()
        rounds = request.config.getoption("rounds")
        if rounds is None:
            fewest, most = ROUNDS[request.config.getoption("shapes")]
            rounds = min(most, max(fewest, int(CASE_MS / sum(ms[-1] for ms in turns.times.values()))))
        benchmark.pedantic(turns, rounds=rounds)
        times = {name: values[-rounds:] for name, values in turns.times.items()}
        on_device = None
        if case.device == "cuda":
            host_ms = {name: min(values) for name, values in times.items()}
            on_device = harness.time_on_device(prepared.runs, host_ms, rounds)
        peaks, wanted = {}, request.config.getoption("peak")
        if wanted and wanted in str(case):
            script = str(Path(__file__).parent / "peak.py")
            for name in prepared.runs:
                try:
                    peaks[name] = harness.peak_memory([script, request.module.__file__, str(case), name])
                except RuntimeError as error:
                    # Its time is in the row.
                    print(f"{bench.name} {case}: no peak of {name}: {error}")
        rows = suite.make_rows(bench, case, prepared, times, on_device, peaks)
        benchmark.extra_info.update(bench=bench.name, rows=rows, provenance=harness.provenance(), ms=times)
        request.config.stash[RESULTS].append((f"{bench.name} {case}", rows))
        if prepared.failure is not None:
            raise prepared.failure
        return rows

    return run


def pytest_terminal_summary(terminalreporter, config):
    for title, rows in config.stash[RESULTS]:
        terminalreporter.section(title, sep="-")
        terminalreporter.line(suite.describe(rows))
