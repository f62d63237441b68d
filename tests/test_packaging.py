import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgfn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_kernels_resolve_inside_the_package_and_only_there():
    import fastgfn.kernels

    assert Path(fastgfn.kernels.__file__).parent.name == "kernels"
    at_root = "import sys; sys.path.insert(0, '.'); "
    for code, error in (
        # transformers looks for a package named kernels: it must find none that it could use
        ("import fastgfn", ""),
        ("import kernels.log_probs", "No module named 'kernels.log_probs'"),
        ("from kernels import log_probs", "cannot import name 'log_probs'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", at_root + code], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (error == "") and error in done.stderr


def test_public_names_are_frozen():
    assert sorted(fastgfn.__all__) == [
        "Behavior",
        "Constraints",
        "LMReward",
        "LogProbs",
        "Policy",
        "ProductReward",
        "ReplayBuffer",
        "Rollouts",
        "SequenceReward",
        "TokenTree",
        "TrainConfig",
        "Trainer",
        "backend_info",
        "detailed_balance_loss",
        "interpolated_subtb_loss",
        "length_normalized_trajectory_balance_loss",
        "load_policy",
        "log_reward",
        "modified_detailed_balance_loss",
        "modified_subtb_loss",
        "pack",
        "relative_trajectory_balance_loss",
        "rooted_prefix_tb_loss",
        "sample",
        "score",
        "score_and_reward",
        "subtb_loss",
        "trajectory_balance_loss",
        "vargrad_loss",
    ]
    assert all(hasattr(fastgfn, name) for name in fastgfn.__all__)
    import fastgfn.functional as functional

    assert sorted(functional.__all__) == [
        "build_tree",
        "detailed_balance_loss",
        "importance_weights",
        "interpolated_log_reward",
        "interpolated_subtb_loss",
        "linear_log_probs",
        "log_probs_from_logits",
        "modified_detailed_balance_loss",
        "modified_subtb_loss",
        "policy_reward_log_probs",
        "relative_trajectory_balance_loss",
        "residual_loss",
        "rooted_prefix_tb_loss",
        "rooted_prefix_terms",
        "sample_next",
        "sample_next_from_hidden",
        "subtb_loss",
        "subtb_potential",
        "termination_log_prob",
        "trajectory_balance_loss",
        "trajectory_balance_residual",
        "vargrad_loss",
    ]


def test_backend_info_names_a_backend_for_every_op():
    info = fastgfn.backend_info()
    assert {"linear_log_probs", "tree_attention", "subtb", "build_tree", "sample_next"} <= set(info["ops"])
    assert all(row["cpu"] and row["cuda"] for row in info["ops"].values())
    assert info["versions"]["torch"] != "absent"


# Ops of the dispatcher that are a part of the op named here.
PARTS = {
    "gumbel_draw": "sample_next",
    "head_gumbel_draw": "sample_next_from_hidden",
    "philox4x32": "sample_next",
    "head_forward": "linear_log_probs",
    "linear_log_probs_frozen": "linear_log_probs",
    "subtb_tree": "subtb",
    "subtb_tree_pairs": "subtb",
    "subtb_pairwise": "subtb_padded",
    "decode_update_": "decode_update",
}


def test_backend_info_leaves_no_op_of_the_dispatcher_out():
    import torch

    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastgfn::")}
    names = {n.removeprefix("fastgfn::").removesuffix("_backward") for n in names}
    assert {PARTS.get(n, n) for n in names} <= set(fastgfn.backend_info()["ops"])


def test_every_op_has_a_cpu_kernel_and_a_fake():
    import torch

    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastgfn::")]
    assert len(names) >= 12
    for name in names:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(name, "CPU") or has(name, "CompositeExplicitAutograd"), name
        fake = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
        assert fake is not None or has(name, "Meta"), name


def _quick_start():
    return _blocks()[0]


def _blocks():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2, "README has two python blocks"
    return blocks


def test_the_training_example_runs(tiny_policy, tmp_path):
    """But for its length and its folder."""
    from fastgfn import Constraints, LMReward, TrainConfig, Trainer
    from fastgfn.evaluate import bounds

    policy, constraints = tiny_policy(dtype=torch.float32), Constraints(0, max_length=3)
    space = dict(policy=policy, prompts=[[1, 2]], reward=LMReward(policy.reference), constraints=constraints)
    space |= dict(TrainConfig=TrainConfig, Trainer=Trainer, Path=Path, bounds=bounds)
    text = _blocks()[1].replace("steps=400", "steps=2").replace("runs/mine", str(tmp_path / "run"))
    exec(text, space)
    assert space["trainer"].steps_done == 2 and space["config"].replay_share == (0.5, 0.0)


def test_the_quick_start_is_short():
    lines = [line for line in _quick_start().splitlines() if line.strip()]
    assert len(lines) < 15, len(lines)


@pytest.mark.slow
def test_the_quick_start_runs_and_trains():
    space: dict = {}
    exec(_quick_start(), space)
    assert space["loss"].isfinite() and float(space["loss"]) > 0
    policy = space["policy"]
    assert any(float(p.detach().abs().max()) > 0 for n, p in policy.parameters() if "lora_B" in n)


def test_the_readme_tree_lists_what_exists():
    tree = re.search(r"```text\n(.*?)```", README, re.S).group(1)
    named = re.findall(r"[\w/.-]+\.(?:py|cpp|cu|md|toml|sh)", tree)
    missing = [n for n in named if not list(ROOT.glob(n)) and not list(ROOT.rglob(Path(n).name))]
    assert not missing


def test_the_two_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("install", "demo", "test", "test-oldest", "test-torchgfn", "lint", "bench", "gpu-check"):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make demo" in README and "make test" in README


def test_an_sdist_holds_what_a_build_needs(tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    import tarfile

    names = tarfile.open(next(tmp_path.glob("*.tar.gz"))).getnames()
    for wanted in (
        "csrc/ops.cpp",
        "csrc/checks.h",
        "csrc/cuda/subtb.cu",
        "kernels/__init__.py",
        "fastgfn/train.py",
    ):
        assert any(n.endswith(wanted) for n in names), wanted
