"""The run folder and the checkpoints in it: nothing of the user's is lost, nothing damaged is trusted."""

import json

import pytest

from fastgfn.checkpoint import RUN_FILES, prepare_run_folder, read_json, read_run
from fastgfn.checks import InputError

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
