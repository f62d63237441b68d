"""The commands; each parses its options, builds the objects of the library and calls them."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fastgfn import checks
from fastgfn.checkpoint import read_json, read_run
from fastgfn.cli.bench import run as run_bench
from fastgfn.cli.rng import RngRun, RngSettings
from fastgfn.config import TrainConfig
from fastgfn.models import BUNDLED, SHAPES, load_policy
from fastgfn.rollout import sample as draw_samples
from fastgfn.throughput import Workload
from fastgfn.types import Constraints

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GFlowNet fine-tuning of language models.",
)
train = typer.Typer(no_args_is_help=True, help="Train a sampler on a task.")
app.add_typer(train, name="train")

# One line is one sequence: every character at which str.splitlines breaks, and the escape itself.
ESCAPES = {ord(c): repr(c)[1:-1] for c in "\\\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
ModelOption = Annotated[str, typer.Option(help="'smollm2-135m', a hub id or a local folder.")]


@train.command("rng")
def train_rng(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/rng"),
    model: ModelOption = BUNDLED,
    seed: Annotated[int | None, typer.Option(help="Of adapter, sampling and replay; 0 unless set.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    terminator: Annotated[str, typer.Option(help="'newline', 'eos' or a token id.")] = "newline",
    prompt: Annotated[str | None, typer.Option(help="Prompt text; the default is the paper's.")] = None,
    min_length: Annotated[int, typer.Option(help="Fewest tokens of a sequence.")] = 0,
    max_length: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 4,
    penalty: Annotated[float, typer.Option(help="Nats per token of a string that is no integer.")] = 16.0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 32,
    lora_dropout: Annotated[float, typer.Option(help="Must be 0.")] = 0.0,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of fastgfn.config.TrainConfig; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the newest checkpoint of the run folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the run folder.")] = False,
    plots: Annotated[bool, typer.Option(help="Write TensorBoard events and the histogram.")] = True,
) -> None:
    """Teach a model to draw uniform random integers, and measure the exact distance to the target."""
    flags = {"seed": seed, "steps": steps}
    overrides = _overrides(option or [])
    TrainConfig.from_dict(overrides)
    overrides |= {k: v for k, v in flags.items() if v is not None}
    settings = RngSettings(
        output=output,
        model=model,
        terminator=terminator,
        prompt=prompt,
        min_length=min_length,
        max_length=max_length,
        penalty=penalty,
        lora_rank=lora_rank,
        lora_dropout=lora_dropout,
        plots=plots,
    )
    finished = RngRun(settings, overrides, resume=resume, overwrite=overwrite).run()
    if not finished:
        raise typer.Exit(130)


@app.command()
def sample(
    adapter: Annotated[Path, typer.Option(help="Run folder or PEFT adapter folder.")],
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Sequences to draw.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 1 draws from the posterior.")] = 1.0,
    target_temperature: Annotated[
        float | None,
        typer.Option(help="T of the posterior R^(1/T), of an adapter that is conditioned on it."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model; the run folder knows its own.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt text; the run folder knows its own.")] = None,
    termination_token_id: Annotated[int | None, typer.Option(help="Token that ends a sequence.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a sequence.")] = None,
) -> None:
    """Draw sequences from a trained sampler, one per line.

    Backslashes and line breaks within a sequence are written as Python escapes: \\\\ and \\n.
    """
    run = read_run(adapter) if os.path.exists(adapter / "run.json") else {}
    described = adapter / "adapter_config.json"
    base = read_json(described).get("base_model_name_or_path") if os.path.exists(described) else None
    fix = "pass --model, or restore adapter_config.json"
    named = base is None or isinstance(base, str)
    checks.check(named, "sample", "base_model_name_or_path", "text", repr(base)[:80], fix)
    policy = load_policy(model or run.get("model") or base or BUNDLED, adapter=adapter)
    ids = run.get("prompt_ids") if prompt is None else policy.encode(prompt)
    checks.check(
        ids is not None, "sample", "prompt", "given", None, "pass --prompt, or a run folder with run.json"
    )
    stop = termination_token_id
    if stop is None:
        stop = run.get("termination_token_id", getattr(policy.tokenizer, "eos_token_id", None))
    checks.check(
        stop is not None, "sample", "termination_token_id", "given", None, "pass --termination-token-id"
    )
    longest = max_length if max_length is not None else run.get("max_length", 32)
    rollouts = draw_samples(
        [ids],
        policy=policy,
        constraints=Constraints(stop, max_length=longest),
        num_samples=num_samples,
        temperature=temperature,
        target_temperature=target_temperature,
        seed=seed,
    )
    for sequence in rollouts.sequences():
        print(policy.decode(sequence).translate(ESCAPES))


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="'smollm2-135m' (default), a hub id or a folder.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights: {', '.join(SHAPES)}.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Sequences per prompt.")] = 20,
    prompts: Annotated[int, typer.Option(help="Prompts in a step.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 200,
    output_tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 30,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU), bfloat16 (on a GPU), float16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps.")] = 3,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="'hf': transformers' generate and a plain step in turns.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here too.")] = None,
) -> None:
    """Measure tokens per second of a training step here, phase by phase."""
    workload = Workload(
        prompts=prompts,
        num_samples=num_samples,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        seed=seed,
    )
    run_bench(
        workload,
        model=model,
        shape=shape,
        lora_rank=lora_rank,
        dtype=dtype,
        device=device,
        compare=compare,
        json_file=json_file,
    )


@app.command()
def lab(
    everything: Annotated[
        bool, typer.Option("--all", help="Every table of the README; of SmolLM2 the default objective alone.")
    ] = False,
    problem: Annotated[list[str] | None, typer.Option(help="Name of a problem; repeatable.")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="Name of an objective; repeatable.")] = None,
    behavior: Annotated[list[str] | None, typer.Option(help="Name of a behaviour; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each kind, with seeds 0, 1, ...")] = 1,
    jobs: Annotated[int, typer.Option(help="Runs at a time, which share the cores.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of results; finished runs there are kept.")] = Path(
        "runs/lab"
    ),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of every run.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of fastgfn.config.TrainConfig; repeatable.")
    ] = None,
    stop_at: Annotated[float | None, typer.Option(help="End a run at this total variation.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Run again what is there.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw curves and bars.")] = True,
    names: Annotated[bool, typer.Option("--list", help="Print the names to choose from.")] = False,
) -> None:
    """Train on problems whose posterior is known, and measure the exact distance to it."""
    from fastgfn.cli import lab as laboratory

    if names:
        return laboratory.show_list(Console())
    overrides = _overrides(option or []) | ({} if steps is None else {"steps": steps})
    settings = laboratory.LabSettings(
        everything=everything,
        problems=problem or [],
        objectives=objective or [],
        behaviors=behavior or [],
        seeds=seeds,
        jobs=jobs,
        output=output,
        overrides=overrides,
        stop_at=stop_at,
        overwrite=overwrite,
        plots=plots,
    )
    if not laboratory.main(settings):
        raise typer.Exit(130)


@app.command()
def info() -> None:
    """Print versions, devices and which backend serves each op."""
    import fastgfn

    report = fastgfn.backend_info()
    console = Console()
    versions = Table("package", "version", title="versions")
    for name, version in report["versions"].items():
        versions.add_row(name, version)
    console.print(versions)
    backends = Table("op", "CPU", "CUDA", title=f"backends (device: {report['device']})")
    for name, row in report["ops"].items():
        backends.add_row(name, row["cpu"], row["cuda"])
    console.print(backends)


def _overrides(pairs: list[str]) -> dict:
    """key=value strings -> settings; values are JSON, or plain strings."""
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        checks.check(
            bool(equals), "--set", "each setting", "key=value", repr(pair), "e.g. --set num_samples=64"
        )
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values
