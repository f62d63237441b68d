import json
import math
from itertools import product

import pytest
import torch

from fastgfn.checkpoint import checkpoints, read_state
from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.models import load_policy
from fastgfn.packing import split_tree
from fastgfn.rewards import LMReward, SequenceReward
from fastgfn.train import Trainer
from fastgfn.types import Constraints

SMALL = dict(num_samples=8, replay_samples=4, replay_capacity=16, warmup_steps=2, checkpoint_every=3)


def _value(z):
    return 0.5 * sum(z) - 1.5 * len(z)


def _trainer(policy, reward=None, constraints=None, prompts=((1, 2), (3,)), **config):
    return Trainer(
        policy,
        prompts=prompts,
        reward=reward or SequenceReward(lambda zs: [_value(z) for z in zs]),
        constraints=constraints or Constraints(0, max_length=3),
        config=TrainConfig(**(SMALL | config)),
    )


def _weights(policy):
    return {name: p.detach().clone() for name, p in policy.parameters()}


@pytest.mark.parametrize(("min_length", "precision"), [(0, None), (1, None), (0, "bfloat16"), (0, "int8")])
def test_learns_a_known_posterior(tiny_policy, min_length, precision):
    """Whatever the precision of the rollouts."""
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8)
    constraints = Constraints(0, min_length=min_length, max_length=3)
    space = [list(z) for k in range(min_length, 4) for z in product(range(1, 4), repeat=k)]
    log_r = torch.tensor([_value(z) for z in space], dtype=torch.float64)
    target = log_r - log_r.logsumexp(0)

    def distance():
        log_q, _ = sequence_log_probs([1, 2], space, policy=policy, constraints=constraints)
        return divergence(log_q, target, 0.0)

    assert distance().tv > 0.25
    trainer = _trainer(
        policy, constraints=constraints, prompts=[[1, 2]], steps=150, num_samples=48, learning_rate=2e-2,
        rollout_precision=precision,
    )  # fmt: skip
    for _ in range(150):
        metrics = trainer.step()
    assert trainer.merges and distance().tv <= 0.02 and distance().kl_target_to_model <= 1e-3
    assert metrics["log_z"] == pytest.approx(float(log_r.logsumexp(0)), abs=0.02)


@pytest.mark.parametrize("convention", ["forced", "own"])
def test_drift_is_the_distance_of_the_sampler_from_the_score(tiny_policy, convention):
    def drift(precision):
        policy = tiny_policy(dtype=torch.float32)
        constraints = Constraints(0, min_length=1, max_length=8, termination=convention)
        return _trainer(policy, constraints=constraints, rollout_precision=precision, max_tokens=20).step()[
            "drift"
        ]

    assert 0.0 <= drift(None) < 1e-5 < 1e-4 < drift("bfloat16") < drift("int8") < 0.1


def test_merging_is_given_up_when_it_drifts_and_a_resumed_run_remembers(tiny_policy, tmp_path, monkeypatch):
    options = dict(rollout_precision="bfloat16", steps=2, constraints=Constraints(0, max_length=8))
    monkeypatch.setattr("fastgfn.train.MOST_DRIFT", 1e-4)
    trainer = _trainer(tiny_policy(dtype=torch.float32), **options)
    with pytest.warns(UserWarning, match="merged weights drift by .* nats per token, more than 0.0001"):
        trainer.step()
    assert not trainer.merges and trainer.step()["drift"] < 1e-5
    trainer.save(tmp_path)
    resumed = _trainer(tiny_policy(dtype=torch.float32), **options)
    resumed.resume(tmp_path)
    assert not resumed.merges


def test_resume_is_bit_identical_to_the_uninterrupted_run(tiny_policy, tmp_path):
    options = dict(
        steps=7, prompts_per_step=2, accumulation=2, replay_duplicates="near", tempered_share=(0.5, 0.5)
    )
    straight = _trainer(tiny_policy(dtype=torch.float32), **options)
    straight.fit(tmp_path / "a")
    stopped = _trainer(tiny_policy(dtype=torch.float32), **options)
    assert not stopped.fit(tmp_path / "b", should_stop=lambda: stopped.steps_done == 4)
    resumed = _trainer(tiny_policy(dtype=torch.float32, scale=6.0), **options)
    assert resumed.resume(tmp_path / "b") == 4
    assert resumed.fit(tmp_path / "b")
    want = _weights(straight.policy)
    for name, value in _weights(resumed.policy).items():
        assert torch.equal(value, want[name]), name
    assert resumed.buffer.state() == straight.buffer.state()
    assert (resumed.trajectories, resumed.tokens) == (straight.trajectories, straight.tokens)


def test_a_checkpoint_is_whole_or_absent_and_old_ones_go(tiny_policy, tmp_path):
    trainer = _trainer(tiny_policy(dtype=torch.float32), steps=12)
    trainer.fit(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009", "step-00000012"]
    (tmp_path / "checkpoints" / "step-00000099").mkdir()
    assert [p.name for p in checkpoints(tmp_path)][-1] == "step-00000012"
    names = {p.name for p in checkpoints(tmp_path)[-1].iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "state.json",
    } <= names


def test_resume_refuses_other_settings(tiny_policy, tmp_path):
    _trainer(tiny_policy(dtype=torch.float32), steps=2).fit(tmp_path)
    with pytest.raises(InputError, match="learning_rate must be 0.001, got 0.5; resume with the settings"):
        _trainer(tiny_policy(dtype=torch.float32), steps=2, learning_rate=0.5).resume(tmp_path)
    with pytest.raises(InputError, match="objective must be 'modified_subtb', got 'vargrad'; resume with"):
        _trainer(tiny_policy(dtype=torch.float32), steps=2, objective="vargrad").resume(tmp_path)
    with pytest.raises(InputError, match="max_tokens must be None, got 64; resume with the settings"):
        _trainer(tiny_policy(dtype=torch.float32), steps=2, max_tokens=64).resume(tmp_path)
    with pytest.raises(InputError, match="must be a run with an intact checkpoint"):
        _trainer(tiny_policy(dtype=torch.float32)).resume(tmp_path / "nothing")
    with pytest.raises(InputError, match="max_length must be 3, got 2"):
        _trainer(tiny_policy(dtype=torch.float32), constraints=Constraints(0, max_length=2), steps=2).resume(
            tmp_path
        )
    with pytest.raises(InputError, match="trainable tensors must be"):
        _trainer(tiny_policy(dtype=torch.float32, rank=2), steps=2).resume(tmp_path)


def test_a_run_from_before_a_setting_resumes_with_its_default(tiny_policy, tmp_path, monkeypatch):
    _trainer(tiny_policy(dtype=torch.float32), steps=2).fit(tmp_path)

    def older(path):
        state = read_state(path)
        for key in ("objective", "tempered_share", "extra_termination_token_ids", "grammar"):
            del state["run"][key]
        return state

    for path in checkpoints(tmp_path):
        state = json.loads((path / "state.json").read_text())
        del state["merges"]
        (path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr("fastgfn.durable.read_state", older)
    resumed = _trainer(tiny_policy(dtype=torch.float32), steps=2)
    assert resumed.resume(tmp_path) == 2 and resumed.merges
    stops = Constraints(0, max_length=3, extra_termination_token_ids=(5,))
    with pytest.raises(InputError, match=r"extra_termination_token_ids must be \[\], got \[5\]"):
        _trainer(tiny_policy(dtype=torch.float32), constraints=stops, steps=2).resume(tmp_path)
    with pytest.raises(InputError, match="objective must be 'modified_subtb', got 'vargrad'"):
        _trainer(tiny_policy(dtype=torch.float32), steps=2, objective="vargrad").resume(tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_policy, tmp_path):
    trainer = _trainer(tiny_policy(dtype=torch.float32), steps=6)
    trainer.fit(tmp_path)
    want = _weights(trainer.policy)
    (checkpoints(tmp_path)[-1] / "optimizer.safetensors").write_bytes(b"cut")
    again = _trainer(tiny_policy(dtype=torch.float32), steps=6)
    with pytest.warns(UserWarning, match="passed over"):
        assert again.resume(tmp_path) == 3
    (checkpoints(tmp_path)[-1] / "state.json").unlink()
    again.fit(tmp_path)
    assert all(torch.equal(v, want[n]) for n, v in _weights(again.policy).items())


def test_accumulation_averages_the_micro_batches(tiny_policy):
    """Two micro-batches of one prompt each = one micro-batch of both prompts, group-pooled."""
    common = dict(replay_samples=0, tempered_share=(0.0, 0.0), steps=1)
    one = _trainer(tiny_policy(), prompts=[[1, 2]] * 2, accumulation=2, **common)
    two = _trainer(tiny_policy(), prompts=[[1, 2]] * 2, prompts_per_step=2, **common)
    a, b = one.step(), two.step()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    assert a["trajectories"] == b["trajectories"] == 16


@pytest.mark.parametrize("min_length", [0, 1])
@pytest.mark.parametrize("normalization", ["group", "batch", "trajectory"])
def test_parts_and_checkpointing_train_the_same_weights(tiny_policy, min_length, normalization, monkeypatch):
    """Three steps with replay: every metric, every weight and the buffer are those of whole passes."""
    constraints = Constraints(0, min_length=min_length, max_length=3)
    common = dict(prompts_per_step=2, accumulation=2, learning_rate=1e-2, normalization=normalization)
    runs, num_parts = [], []

    def counted(tree, **options):
        parts = split_tree(tree, **options)
        num_parts.append(len(parts))
        return parts

    monkeypatch.setattr("fastgfn.passes.split_tree", counted)
    for savings in ({}, {"max_tokens": 9, "gradient_checkpointing": True}):
        policy = tiny_policy(family="gpt2", scale=2.0)
        reward = LMReward(policy.reference)
        trainer = _trainer(policy, reward=reward, constraints=constraints, **common, **savings)
        assert policy.gradient_checkpointing == bool(savings)
        runs.append(([trainer.step() for _ in range(3)], _weights(policy), trainer.buffer.state()))
    assert num_parts[:6] == [1] * 6 and all(n > 1 for n in num_parts[6:]) and len(num_parts) == 12
    (metrics, weights, buffer), (want, want_weights, want_buffer) = runs[1], runs[0]
    for got, row in zip(metrics, want, strict=True):
        assert got == pytest.approx(row, rel=1e-10)
    for name, value in weights.items():
        torch.testing.assert_close(value, want_weights[name], rtol=1e-8, atol=1e-10)
    assert [[row[1] for row in v] for v in buffer["entries"].values()] == [
        [row[1] for row in v] for v in want_buffer["entries"].values()
    ]


@pytest.mark.parametrize("where", ["reward", "update"])
def test_a_failed_step_can_be_tried_again(tiny_policy, where, monkeypatch):
    """As if nothing had been: the same draws, metrics, weights and buffer as without the failure."""
    options = dict(steps=4, accumulation=2, learning_rate=1e-2, prompts=[[1, 2]])
    calls, failing = [], []

    def value(zs):
        calls.append(len(zs))
        if failing and len(calls) == failing[0]:
            raise RuntimeError("the scorer is down")
        return [_value(z) for z in zs]

    undisturbed, disturbed = (
        _trainer(tiny_policy(dtype=torch.float32), SequenceReward(value), **options) for _ in range(2)
    )
    want = [undisturbed.step() for _ in range(3)]
    got = [disturbed.step()]
    before = (_weights(disturbed.policy), disturbed.buffer.state(), disturbed.trajectories, disturbed.tokens)
    assert len(disturbed.buffer) > 4
    with monkeypatch.context() as broken:
        if where == "reward":
            # of the second micro-batch
            failing.append(len(calls) + 2)
        else:
            broken.setattr(disturbed.optimizer, "step", lambda: 1 / 0)
        with pytest.raises(RuntimeError if where == "reward" else ZeroDivisionError):
            disturbed.step()
    after = (disturbed.buffer.state(), disturbed.trajectories, disturbed.tokens)
    assert after == before[1:] and disturbed.steps_done == 1 and disturbed.merges
    assert all(torch.equal(v, before[0][n]) for n, v in _weights(disturbed.policy).items())
    assert all(p.grad is None for _, p in disturbed.policy.parameters())
    got += [disturbed.step() for _ in range(2)]
    assert got == want
    assert all(torch.equal(v, _weights(undisturbed.policy)[n]) for n, v in _weights(disturbed.policy).items())
    assert disturbed.buffer.state() == undisturbed.buffer.state()


def test_every_prompt_is_visited_once_per_epoch(tiny_policy):
    prompts = [[i] for i in range(1, 8)]
    trainer = _trainer(tiny_policy(), prompts=prompts, prompts_per_step=3, accumulation=2)
    stream = [p for step in range(7) for micro in range(2) for p in trainer.explorer.prompts(step, micro)]
    epochs = [stream[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == prompts for e in epochs) and len({str(e) for e in epochs}) > 1


def test_refuses_what_cannot_be_trained(tiny_policy, tmp_path):
    terminal = SequenceReward(lambda zs: [0.0] * len(zs), terminal_only=True)
    with pytest.raises(InputError, match="terminal-only reward.*set objective='vargrad'"):
        _trainer(tiny_policy(), reward=terminal)
    want = r"config.max_tokens must be >= 5, the longest prompt and max_length, got 4; raise it"
    with pytest.raises(InputError, match=want):
        _trainer(tiny_policy(), max_tokens=4)
    with pytest.raises(InputError, match="prompts must be at least one prompt"):
        _trainer(tiny_policy(), prompts=[])
    bad = SequenceReward(lambda zs: [math.nan] * len(zs))
    trainer = _trainer(tiny_policy(dtype=torch.float32), reward=bad)
    before = _weights(trainer.policy)
    with pytest.raises(InputError, match="log R must be finite, got nan"):
        trainer.step()
    assert all(torch.equal(v, before[n]) for n, v in _weights(trainer.policy).items())
    with pytest.raises(InputError, match="lora_dropout must be 0, got 0.1"):
        load_policy("anything", lora_dropout=0.1)


def test_the_lm_reward_posterior_is_learned(tiny_policy):
    """p(X Z stop)^(1/T) at T = 0.7 on an enumerable vocabulary."""
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8)
    constraints = Constraints(0, max_length=2)
    space = [list(z) for k in range(3) for z in product(range(1, 4), repeat=k)]
    reward = LMReward(policy.reference)
    from fastgfn.packing import pack
    from fastgfn.types import Rollouts

    tokens = torch.zeros(len(space), 2, dtype=torch.int64)
    for row, z in zip(tokens, space, strict=True):
        row[: len(z)] = torch.tensor(z, dtype=torch.int64)
    lengths = torch.tensor([len(z) for z in space])
    zeros = torch.zeros(len(space))
    tree = pack(Rollouts((torch.tensor([1, 2]),), zeros.long(), tokens, lengths, zeros, constraints))
    log_r = reward(tree)[tree.leaf].double() / 0.7
    trainer = _trainer(
        policy,
        reward=reward,
        constraints=constraints,
        prompts=[[1, 2]],
        steps=200,
        num_samples=48,
        learning_rate=2e-2,
        reward_temperature=(1.0, 0.7),
        reward_horizon=30,
    )
    for _ in range(200):
        trainer.step()
    log_q, _ = sequence_log_probs([1, 2], space, policy=policy, constraints=constraints)
    assert divergence(log_q, log_r - log_r.logsumexp(0), 0.0).tv <= 0.02
