"""A number that is nan or inf stops the run, names its trajectories and leaves everything as it was."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastgfn import failures
from fastgfn.checkpoint import checkpoints, prepare_run_folder
from fastgfn.checks import NonFiniteError
from fastgfn.config import TrainConfig
from fastgfn.rewards import SequenceReward
from fastgfn.train import Trainer
from fastgfn.types import Constraints

SPACE = [[], [1], [2], [1, 1], [1, 2], [2, 1]]


def _trainer(policy, value, **config):
    given = dict(demonstrations=[(0, z) for z in SPACE]) if config.pop("given", False) else {}
    defaults = dict(num_samples=6, replay_samples=3, replay_duplicates="exact", steps=6, checkpoint_every=1)
    return Trainer(
        policy,
        prompts=[[1, 2]],
        reward=SequenceReward(value),
        constraints=Constraints(0, max_length=2),
        config=TrainConfig(**(defaults | config)),
        **given,
    )


def _state(trainer):
    weights = {n: p.detach().clone() for n, p in trainer.policy.parameters()}
    state = trainer.optimizer.state_dict()["state"]
    moments = {(i, f): float(v.double().sum()) for i, fields in state.items() for f, v in fields.items()}
    return weights, (
        moments,
        trainer.buffer.state(),
        trainer.steps_done,
        trainer.trajectories,
        trainer.tokens,
    )


def _same(before, after):
    same = before[0].keys() == after[0].keys() and before[1] == after[1]
    return same and all(torch.equal(v, after[0][n]) for n, v in before[0].items())


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_reward_that_fails_at_a_step_stops_the_run(tiny_policy, tmp_path, bad):
    """failed_step.json names the trajectories through the bad prefix; the last checkpoint is the one before,
    and the run goes on from it as if nothing had been."""
    turned = []

    def value(zs):
        return [bad if turned and z[:1] == [turned[0]] else -0.5 * len(z) for z in zs]

    policy = tiny_policy(dtype=torch.float32, scale=2.0)
    policy.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(f"t{i}" for i in ids))
    trainer, states = _trainer(policy, value), []

    def on_step(step, metrics):
        if step == 3:
            states.append(_state(trainer))
            reward, first = trainer.reward, trainer.trajectories
            kept = trainer.buffer.snapshot()
            drawn = trainer.explorer.draw(3, 0, reward=reward, first_trajectory=first).fresh
            trainer.buffer.restore(kept)
            turned.append(next(z[0] for z in drawn.sequences() if z))

    prepare_run_folder(tmp_path)
    want = r"log R must be finite, got (nan|-inf) for Z = \[\d+.*; the first of \d+ trajectories: "
    with pytest.raises(
        NonFiniteError, match=want + r"prompt \[1, 2\], Z = \[\d+.*\('t\d+.*'\); see .*failed_step.json"
    ):
        trainer.fit(tmp_path, on_step=on_step)
    assert _same(states[0], _state(trainer)) and all(p.grad is None for _, p in policy.parameters())
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    saved = json.loads((tmp_path / "failed_step.json").read_text())
    assert (saved["step"], saved["seed"], saved["prompts"]) == (3, 0, [[[1, 2]]])
    assert saved["config"]["num_samples"] == 6 and "must be finite" in saved["error"]
    assert saved["trajectories"]
    for row in saved["trajectories"]:
        assert row["prompt"] == [1, 2] and row["tokens"][0] == turned[0]
        assert row["text"].startswith(f"t{turned[0]}") and math.isfinite(row["log_q"])
        assert math.isfinite(row["log_reward"]) is False
    assert any(math.isfinite(row["log_behavior"]) for row in saved["trajectories"])
    turned.clear()
    again = _trainer(tiny_policy(dtype=torch.float32, scale=2.0), value)
    assert again.resume(tmp_path) == 3 and again.fit(tmp_path)
    straight = _trainer(tiny_policy(dtype=torch.float32, scale=2.0), value)
    straight.fit(tmp_path / "b")
    assert _same(_state(straight), _state(again))
    run = {"model": "m", "prompt_ids": [1], "termination_token_id": 0, "max_length": 2, "train": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    prepare_run_folder(tmp_path, overwrite=True)
    assert not (tmp_path / "failed_step.json").exists()


def test_a_reward_of_zero_everywhere_is_refused_at_once(tiny_policy):
    trainer = _trainer(tiny_policy(dtype=torch.float32), lambda zs: [-math.inf] * len(zs))
    before = _state(trainer)
    with pytest.raises(NonFiniteError, match="log R must be finite, got -inf .*clamp the reward") as caught:
        trainer.step()
    assert len(caught.value.trajectories) >= 2 and _same(before, _state(trainer))


@pytest.mark.parametrize("how", ["drawn", "given"])
def test_poisoned_weights_stop_the_run(tiny_policy, tmp_path, how):
    """Where sequences are drawn, drawing fails; where they are given, their log q and the loss are nan."""
    options = dict(num_samples=0, replay_samples=0, demonstration_samples=(6, 6), given=True)
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), lambda zs: [0.0] * len(zs), **(options if how == "given" else {})
    )
    trainer.step()
    with torch.no_grad():
        trainer.policy.parameters()[-1][1].view(-1)[0] = math.nan
    want = "hidden states must be finite" if how == "drawn" else "the loss must be finite, got nan; lower"
    with pytest.raises(NonFiniteError, match=f"{want}.*; see .*failed_step.json"):
        trainer.fit(tmp_path)
    saved = json.loads((tmp_path / "failed_step.json").read_text())
    assert saved["step"] == 1 and saved["prompts"] == [[[1, 2]]]
    assert sorted(row["tokens"] for row in saved["trajectories"]) == (sorted(SPACE) if how == "given" else [])
    assert all(math.isnan(row["log_q"]) and row["log_reward"] == 0.0 for row in saved["trajectories"])
    assert trainer.steps_done == 1 and trainer.optimizer.state_dict()["state"][0]["step"] == 1


def test_a_nan_loss_leaves_the_checkpoint_before_it(tiny_policy, tmp_path):
    """From which the run goes on as one that never failed."""

    def trainer():
        options = dict(num_samples=0, replay_samples=0, demonstration_samples=(6, 6), given=True)
        policy = tiny_policy(dtype=torch.float32)
        return _trainer(policy, lambda zs: [0.0] * len(zs), checkpoint_every=2, steps=4, **options)

    failing = trainer()

    def poison(step, metrics):
        if step == 3:
            with torch.no_grad():
                failing.policy.parameters()[-1][1].view(-1)[0] = math.nan

    with pytest.raises(NonFiniteError, match="the loss must be finite, got nan"):
        failing.fit(tmp_path / "a", on_step=poison)
    assert sorted(path.name for path in checkpoints(tmp_path / "a"))[-1] == "step-00000002"
    again, whole = trainer(), trainer()
    assert again.resume(tmp_path / "a") == 2
    assert again.fit(tmp_path / "a") and whole.fit(tmp_path / "b")
    assert _same(_state(whole), _state(again))


def test_a_gradient_that_overflows_names_the_largest_residuals(tiny_policy, monkeypatch):
    """Those farthest from log Z(X), whatever constant all rewards have in common."""
    odd = []

    def value(zs):
        return [2000.0 - 900.0 * (z[:1] in odd) - 0.1 * len(z) for z in zs]

    trainer = _trainer(tiny_policy(dtype=torch.float32), value, num_samples=12, reward_temperature=(2.0, 2.0))
    drawn = trainer.explorer.draw(0, 0, reward=trainer.reward).fresh.sequences()
    odd.append(next(z[:1] for z in drawn if z))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(NonFiniteError, match="the gradient norm must be finite, got inf; lower") as caught:
        trainer.step()
    found = [row["tokens"][:1] in odd for row in caught.value.trajectories]
    assert len(found) == failures.WORST and found == sorted(found, reverse=True)
    assert sum(found) == sum(z[:1] in odd for z in drawn) < failures.WORST / 2
    assert trainer.steps_done == 0 and len(trainer.buffer) == 0


def test_a_reward_that_fails_in_a_local_search_is_named(tiny_policy):
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), lambda zs: [math.nan] * len(zs), local_search_samples=(2, 2)
    )
    with pytest.raises(NonFiniteError, match=r"log R must be finite.*: prompt \[1, 2\], Z = \["):
        trainer.step()


@pytest.mark.parametrize("kind", ["scalar", "head"])
def test_a_failed_step_leaves_log_z_unset(tiny_policy, monkeypatch, kind):
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), lambda zs: [-0.5 * len(z) for z in zs], objective="tb", log_z=kind
    )
    value = dict(trainer.log_z.parameters())["log_z.values" if kind == "scalar" else "log_z.offset"]
    with monkeypatch.context() as broken:
        broken.setattr("fastgfn.failures.check_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.step()
    assert bool(value.isnan().all())
    trainer.step()
    assert bool(value.isfinite().all())


def test_a_learned_log_z_that_overflows_the_loss_is_named(tiny_policy, tmp_path):
    options = dict(objective="tb", log_z="scalar", residual_loss="linex")
    trainer = _trainer(tiny_policy(dtype=torch.float32), lambda zs: [-0.1 * len(z) for z in zs], **options)
    trainer.step()
    with torch.no_grad():
        dict(trainer.log_z.parameters())["log_z.values"].fill_(5e3)
    with pytest.raises(NonFiniteError, match=r"the .* must be finite, got inf; lower .*log_z_learning_rate"):
        trainer.fit(tmp_path)
    assert json.loads((tmp_path / "failed_step.json").read_text())["trajectories"]
