"""What the op benches share: cases, providers, the check before the clock, and the rows of a case.

A bench is one file test_bench_*.py with a `BENCH`: inputs, providers, truth, work. Every provider of a bench
gets a row in every case: timed, "not available: reason", "failed: reason" or "wrong: error". fastgfn's own
providers must be right: one that is not has such a row, too, and its case fails once the others have theirs.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import harness
import torch
from torch import Tensor

from fastgfn.testing import relative_error

Outputs = tuple[Tensor, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE_TIME = "device_ms_p50"


class NotAvailable(Exception):
    """A provider cannot run in a case; the message says why."""


class Wrong(AssertionError):
    """A provider of fastgfn disagrees with the float64 reference."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test: all providers of a bench on the same inputs. `sizes` are the columns of the row."""

    bench: str
    device: str
    mode: str
    dtype: str
    sizes: tuple[tuple[str, int | float], ...]

    def __getitem__(self, size: str) -> int | float:
        return dict(self.sizes)[size]

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.sizes)
        return f"{self.device}-{self.mode}-{self.dtype}-{sizes}"


class Step(NamedTuple):
    """What is timed. `outputs` brings its result into the layout of the truth, for the check only."""

    run: Callable[[], Outputs]
    outputs: Callable[[Outputs], Outputs] = lambda result: result


class Provider(NamedTuple):
    """prepare(case, inputs) -> Step; it raises NotAvailable or ImportError where the provider cannot run.

    package: the distribution whose version goes into the row. is_checked: False for a bare product.
    has_logits: it is given logits in the dtype of the inputs, hence a rival's tolerance also for fastgfn.
    """

    prepare: Callable[[Case, object], Step]
    package: str = "torch"
    is_checked: bool = True
    has_logits: bool = False


class Bench(NamedTuple):
    """cases(device, shapes) with shapes "short" or "full"; work(case) -> (FLOP, bytes) that the task needs.

    tolerance: dtype -> largest error of fastgfn and of a rival; `error` gives a provider's from its outputs.
    norm(case): the provider that `of_gemm` divides by, or None.
    """

    name: str
    cases: Callable[[str, str], list[Case]]
    make_inputs: Callable[[Case], object]
    providers: dict[str, Provider]
    truth: Callable[[Case, object], object]
    error: Callable[[Case, object, Outputs, object], float]
    tolerance: dict[str, tuple[float, float]]
    work: Callable[[Case], tuple[float, float]]
    norm: Callable[[Case], str | None] = lambda case: None


def make_cases(
    bench: str,
    device: str,
    modes: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[dict[str, int | float]],
) -> list[Case]:
    """Every shape, in every dtype and mode."""
    return [
        Case(bench, device, mode, dtype, tuple(shape.items()))
        for shape in shapes
        for dtype in dtypes
        for mode in modes
    ]


def need_cuda(case: Case) -> None:
    if case.device != "cuda":
        raise NotAvailable("needs CUDA")


def worst_error(have: Outputs, truth: Outputs) -> float:
    return max(relative_error(a, b) for a, b in zip(have, truth, strict=True))


def is_ours(name: str) -> bool:
    return name.startswith("fastgfn")


class Prepared(NamedTuple):
    """The providers that may be timed, and for every provider its status ("ok", ...) and error (or "").

    failure: of the first provider of fastgfn that raised or is wrong (Wrong), for which the case must fail.
    """

    runs: dict[str, Callable[[], Outputs]]
    status: dict[str, str]
    errors: dict[str, float | str]
    failure: Exception | None = None


def prepare(bench: Bench, case: Case, inputs: object) -> Prepared:
    """Run every provider once and compare it with the truth."""
    truth = bench.truth(case, inputs)
    prepared, failures = Prepared({}, {}, dict.fromkeys(bench.providers, "")), []
    for name, provider in bench.providers.items():
        is_rival = not is_ours(name) or provider.has_logits
        most = bench.tolerance[case.dtype][int(is_rival)]
        try:
            step = provider.prepare(case, inputs)
            result = step.run()
            if provider.is_checked:
                prepared.errors[name] = bench.error(case, inputs, step.outputs(result), truth)
        except NotAvailable as reason:
            prepared.status[name] = f"not available: {one_line(reason)}"
        except Exception as error:
            if is_ours(name):
                error.add_note(f"{bench.name} {case}: {name}")
                failures.append(error)
            is_missing = isinstance(error, ImportError)
            kind = "not available" if is_missing else f"failed: {type(error).__name__}"
            prepared.status[name] = f"{kind}: {one_line(error)}"
        else:
            error = prepared.errors[name]
            if provider.is_checked and not error <= most:
                prepared.status[name] = f"wrong: off by {error:.2g}, more than {most:.2g}"
                if is_ours(name):
                    failures.append(Wrong(f"{bench.name} {case}: {name} is {prepared.status[name]}"))
            else:
                prepared.status[name] = "ok"
                prepared.runs[name] = step.run
    gc.collect()
    return prepared._replace(failure=failures[0] if failures else None)


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def make_rows(
    bench: Bench,
    case: Case,
    prepared: Prepared,
    times: dict[str, list[float]],
    device_times: dict[str, list[float]] | None = None,
    peaks: dict[str, harness.PeakMemory] | None = None,
) -> list[dict]:
    """One row per provider, in the order of the providers; numbers are "" where there is none."""
    flops, num_bytes = bench.work(case)
    clock = times if device_times is None else device_times
    norm = bench.norm(case)
    rows = []
    for name, provider in bench.providers.items():
        row = {"provider": name, "mode": case.mode, "dtype": case.dtype, **dict(case.sizes)}
        row |= {"repeats": len(times.get(name, []))}
        row |= dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", DEVICE_TIME, "of_gemm"), "")
        row |= dict.fromkeys(("tflop_per_s", "gb_per_s", "baseline_bytes", "peak_bytes"), "")
        if name in times:
            row |= harness.percentiles(times[name])
            median = _median(clock[name])
            if device_times is not None:
                row[DEVICE_TIME] = median
            if norm in clock:
                pairs = zip(clock[name], clock[norm], strict=True)
                row["of_gemm"] = _median([mine / gemm for mine, gemm in pairs])
            row["tflop_per_s"] = float(f"{flops / median / 1e9:.4g}")
            row["gb_per_s"] = float(f"{num_bytes / median / 1e6:.4g}")
        if peaks is not None and name in peaks:
            row |= peaks[name]._asdict()
        error = prepared.errors[name]
        row["error"] = error if error == "" else float(f"{error:.2g}")
        row["version"] = "" if is_ours(name) else harness.version(provider.package)
        row["status"] = prepared.status[name]
        rows.append(row)
    return rows


def _median(values: list[float]) -> float:
    return harness.percentiles(values)["ms_p50"]


def describe(rows: Sequence[dict]) -> str:
    """The rows of a case as lines of text."""
    lines = []
    for r in rows:
        text = r["status"]
        if text == "ok":
            text = f"{r['ms_p50']:10.3f} ms ({r['ms_p20']:.3f} to {r['ms_p80']:.3f})"
            text += f", device {r[DEVICE_TIME]:.3f} ms" if r[DEVICE_TIME] != "" else ""
            text += f", {r['of_gemm']:.2f} of gemm" if r["of_gemm"] != "" else ""
            text += f", {r['tflop_per_s']} TFLOP/s, {r['gb_per_s']} GB/s"
            text += f", error {r['error']}" if r["error"] != "" else ""
            if r["peak_bytes"] != "":
                text += f", {(r['peak_bytes'] - r['baseline_bytes']) / 2**20:.0f} MiB"
        lines.append(f"  {r['provider']:>20}: {text}")
    return "\n".join(lines)
