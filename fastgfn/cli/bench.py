"""`fastgfn bench`: tokens per second of a training step on this machine, phase by phase."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastgfn import checks
from fastgfn.models import BUNDLED, Policy, load_policy, random_policy
from fastgfn.throughput import Workload, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(
    workload: Workload,
    *,
    model: str | None,
    shape: str | None,
    lora_rank: int,
    dtype: str | None,
    device: str | None,
    compare: str | None,
    json_file: Path | None,
) -> None:
    """Load, measure, print, and write the JSON file."""
    checks.check(model is None or shape is None, "bench", "--shape", "omitted", shape, "drop it or --model")
    checks.check(compare in (None, "hf"), "bench", "--compare", "'hf'", repr(compare), "omit it")
    if json_file is not None:
        folder = json_file.resolve().parent
        fix = "create it or choose another place"
        checks.check(folder.is_dir(), "bench", "--json", "in an existing folder", str(json_file), fix)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = _load(model, shape, lora_rank, _dtype(dtype, device), device)
    report = {"model": shape and f"{shape}, random weights" or model or BUNDLED, "lora_rank": lora_rank}
    report |= measure(policy, workload, compare=compare)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    show(report)


def _dtype(name: str | None, device: str) -> torch.dtype:
    name = name or ("bfloat16" if device.startswith("cuda") else "float32")
    checks.check(name in DTYPES, "bench", "--dtype", f"one of {', '.join(DTYPES)}", repr(name), "choose one")
    return DTYPES[name]


def _load(model: str | None, shape: str | None, lora_rank: int, dtype: torch.dtype, device: str) -> Policy:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        checks.fail("bench", "--device", "one that is here", f"{device!r} ({reason})", "use --device cpu")
    if shape is not None:
        return random_policy(shape, lora_rank=lora_rank, dtype=dtype, device=device)
    return load_policy(model or BUNDLED, lora_rank=lora_rank, dtype=dtype, device=device)


def show(report: dict) -> None:
    """The report as tables."""
    console, setting = Console(), report["setting"]
    limits = report["limits"]
    console.print(
        f"{report['model']}, {setting['dtype']}, LoRA rank {report['lora_rank']}, on {report['device']}: "
        f"{setting['prompts']} x {setting['num_samples']} sequences of {setting['output_tokens']} tokens "
        f"after {setting['prompt_tokens']}",
        highlight=False,
    )
    console.print(
        f"measured limits: {limits['tflop_per_s']:.3g} TFLOP/s, {limits['gb_per_s']:.3g} GB/s",
        highlight=False,
    )
    for name, provider in report["providers"].items():
        title = (
            f"{name}: {provider['step_ms']:.1f} ms a step, {provider['tokens_per_s']:.1f} drawn tokens/s, "
            f"peak {provider['peak_bytes'] / 2**30:.2f} GiB"
        )
        table = Table(title=title, title_justify="left")
        for column in ("phase", "ms", "calls", "tokens", "tokens/s", "of limit", "peak GiB"):
            table.add_column(column, justify="left" if column == "phase" else "right")
        for phase, row in sorted(provider["phases"].items(), key=lambda item: -item[1]["ms"]):
            table.add_row(
                phase,
                f"{row['ms']:.1f}",
                str(row["calls"]),
                "" if row["tokens"] is None else str(row["tokens"]),
                "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}",
                "" if row["of_limit"] is None else f"{row['of_limit']:.0%}",
                f"{row['peak_bytes'] / 2**30:.2f}",
            )
        console.print(table)
    hf = report["providers"].get("hf")
    if hf:
        ratio = report["providers"]["fastgfn"]["tokens_per_s"] / hf["tokens_per_s"]
        console.print(f"fastgfn draws and learns from {ratio:.2f} times as many tokens per second as hf")
