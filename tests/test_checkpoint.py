"""The run folder and the checkpoints in it: nothing of the user's is lost, nothing damaged is trusted."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgfn.checkpoint import RUN_FILES, checkpoints, prepare_run_folder, read_json, read_run
from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.rewards import SequenceReward
from fastgfn.train import Trainer
from fastgfn.types import Constraints

RUN = {"model": "m", "prompt_ids": [1], "termination_token_id": 0, "max_length": 4, "train": {}}


def _tree(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def _fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(RUN) if path.name == "run.json" else name)


FOREIGN = (
    ".git-credentials",
    ".pre-commit-config.yaml",
    ".venv-oldest/bin/python",
    ".adapter-notes",
    "README.md",
    "events/mine.txt",
    "checkpoints/other-tool.ckpt",
    "checkpoints/.step-notes",
)
LEFTOVERS = (".fastgfn-run.json", ".fastgfn-k3/adapter_config.json", "checkpoints/.fastgfn-step-1/state.json")


def test_only_what_a_run_wrote_is_removed(tmp_path):
    _fill(tmp_path, *FOREIGN)
    before = _tree(tmp_path)
    _fill(tmp_path, *LEFTOVERS)
    for overwrite in (False, True):
        prepare_run_folder(tmp_path, overwrite=overwrite, events=True)
        assert _tree(tmp_path) == before
    written = ("checkpoints/step-00000001/state.json", "events/events.out.tfevents.1.host", *RUN_FILES)
    _fill(tmp_path, *written)
    with pytest.raises(InputError, match="path must be new, got .*--overwrite or another folder"):
        prepare_run_folder(tmp_path)
    prepare_run_folder(tmp_path, overwrite=True)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize(
    "run", [None, "{", "[]", "null", "{}", json.dumps(RUN | {"prompt_ids": ["1"]}), "DIR"]
)
def test_overwrite_needs_a_run_json_that_shows_a_run(tmp_path, run):
    _fill(tmp_path, "checkpoints/step-00000001/state.json", "adapter_model.safetensors", ".fastgfn-old")
    if run == "DIR":
        (tmp_path / "run.json").mkdir()
    elif run is not None:
        (tmp_path / "run.json").write_text(run)
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="another folder"):
        prepare_run_folder(tmp_path, overwrite=True)
    assert _tree(tmp_path) == before


def test_an_adapter_of_another_origin_makes_a_folder_used(tmp_path):
    _fill(tmp_path, "adapter_config.json")
    with pytest.raises(InputError, match="path must be new"):
        prepare_run_folder(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: (run / "events").write_text(""), "events must be a folder, got a file; move it"),
        (lambda run: (run / "report.json").mkdir(), "report.json must be a file, got a folder"),
    ],
)
def test_what_is_in_the_way_is_refused_before_anything_is_removed(tmp_path, make, message):
    _fill(tmp_path, "run.json", "checkpoints/step-00000001/state.json", ".fastgfn-old")
    make(tmp_path)
    before = _tree(tmp_path)
    for mode in (dict(overwrite=True), dict(resume=True)):
        with pytest.raises(InputError, match=message):
            prepare_run_folder(tmp_path, events=True, **mode)
    assert _tree(tmp_path) == before


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    _fill(tmp_path, "run.json", "checkpoints/step-00000001/state.json")
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="one of resume and overwrite"):
        prepare_run_folder(tmp_path, resume=True, overwrite=True)
    assert _tree(tmp_path) == before


def test_a_name_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match="path must be writable, got .*File name too long"):
        prepare_run_folder(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ("{}", "model in .*run.json must be of type str, got nothing"),
        (json.dumps(RUN | {"max_length": "4"}), "max_length in .* must be of type int, got '4'"),
        (json.dumps(RUN | {"max_length": True}), "max_length in .* must be of type int, got True"),
        (json.dumps(RUN | {"prompt_ids": "abc"}), "prompt_ids in .* must be of type list"),
        (json.dumps(RUN | {"prompt_ids": [1, "2"]}), "prompt_ids in .* must be token ids"),
    ],
)
def test_run_json_is_checked(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)


def test_read_json_returns_objects_only(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="a readable JSON file, got UnicodeDecodeError"):
        read_json(path)


def _trainer(policy, steps=4, sign=-1.0):
    return Trainer(
        policy,
        prompts=[[1, 2]],
        reward=SequenceReward(lambda zs: [sign * len(z) for z in zs]),
        constraints=Constraints(0, max_length=3),
        config=TrainConfig(num_samples=4, replay_samples=2, steps=steps, checkpoint_every=1),
    )


@pytest.fixture
def trainer(tiny_policy):
    return lambda **options: _trainer(tiny_policy(dtype=torch.float32), **options)


def _weights(trainer):
    return torch.cat([p.detach().flatten() for _, p in trainer.policy.parameters()])


def _names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_a_folder_with_the_checkpoints_of_another_trainer_is_refused(trainer, tmp_path):
    """Another reward, and a shorter run whose checkpoints would have gone first."""
    first = trainer()
    first.fit(tmp_path)
    before = _tree(tmp_path)
    for other in (trainer(sign=1.0), trainer(steps=1)):
        with pytest.raises(InputError, match="run_folder must be new, or this run's"):
            other.fit(tmp_path)
    late = trainer(steps=6)
    late.step()
    with pytest.raises(InputError, match="run_folder must be new, or this run's"):
        late.save(tmp_path)
    assert _tree(tmp_path) == before
    assert first.fit(tmp_path), "its own folder stays usable"
    again = trainer()
    assert again.resume(tmp_path) == 4 and torch.equal(_weights(again), _weights(first))


def _halve(path):
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.0" in k}, path, metadata={"format": "pt"})


DAMAGE = {
    "optimizer cut": ("optimizer.safetensors", lambda p: p.write_bytes(b"cut")),
    "adapter missing": ("adapter_model.safetensors", lambda p: p.unlink()),
    "adapter halved": ("adapter_model.safetensors", _halve),
    "state cut": ("state.json", lambda p: p.write_text(p.read_text()[:50])),
    "state a list": ("state.json", lambda p: p.write_text("[]")),
    "state empty": ("state.json", lambda p: p.write_text("{}")),
    "buffer odd": ("state.json", lambda p: p.write_text(p.read_text().replace('"entries"', '"x"'))),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_written_again(trainer, tmp_path, how):
    name, damage = DAMAGE[how]
    straight = trainer()
    straight.fit(tmp_path)
    damage(checkpoints(tmp_path)[-1] / name)
    again = trainer()
    with pytest.warns(UserWarning, match="passed over damaged step-00000004"):
        assert again.resume(tmp_path) == 3
    again.fit(tmp_path)
    assert _names(tmp_path) == ["step-00000003", "step-00000004"]
    assert again.resume(tmp_path) == 4 and torch.equal(_weights(again), _weights(straight))
    for path in checkpoints(tmp_path):
        damage(path / name)
    message = "a run with an intact checkpoint, got .*damaged step-00000004.*; train in another folder"
    untouched = trainer()
    with warnings.catch_warnings(), pytest.raises(InputError, match=message):
        warnings.simplefilter("error", UserWarning)
        untouched.resume(tmp_path)
    assert len(untouched.buffer) == 0 and torch.equal(_weights(untouched), _weights(trainer()))


def test_checkpoints_past_the_resumed_one_do_not_push_out_new_ones(trainer, tmp_path):
    trainer(steps=6).fit(tmp_path)
    target = tmp_path / "checkpoints" / "step-00000003"
    checkpoints(tmp_path)[0].rename(target)
    state = json.loads((target / "state.json").read_text()) | {"step": 3}
    (target / "state.json").write_text(json.dumps(state))
    (checkpoints(tmp_path)[-1] / "optimizer.safetensors").write_bytes(b"cut")
    again = trainer(steps=6)
    with pytest.warns(UserWarning):
        assert again.resume(tmp_path) == 3
    again.fit(tmp_path, should_stop=lambda: True)
    assert _names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_kill_while_a_checkpoint_is_replaced_leaves_an_intact_one(trainer, tmp_path, monkeypatch, calls):
    """Stop before the n-th change of a name or removal of a folder, with a single checkpoint to lose."""
    import shutil

    done = trainer()
    done.step()
    done.save(tmp_path)
    left = [calls]

    def killed(call):
        def run(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed(Path.rename))
        patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            done.save(tmp_path)
    again = trainer()
    assert again.resume(tmp_path) == 1 and torch.equal(_weights(again), _weights(done))
    again.fit(tmp_path)
    assert _names(tmp_path)[-2:] == ["step-00000003", "step-00000004"]
