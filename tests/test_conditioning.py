"""One sampler for a range of target temperatures, trained and measured exactly."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, evaluate_temperatures, sequence_log_probs
from fastgfn.models import condition
from fastgfn.packing import pack
from fastgfn.passes import add_gradients
from fastgfn.replay import ReplayBuffer
from fastgfn.rewards import SequenceReward
from fastgfn.rollout import sample
from fastgfn.train import Trainer
from fastgfn.types import Constraints, Rollouts

TRAINED, UNSEEN = (0.4, 0.7, 1.2), (0.5, 0.9)
SMALL = dict(num_samples=8, replay_samples=4, replay_capacity=16, warmup_steps=2, checkpoint_every=3)
PROMPT = [1, 2]


def _space(vocab, longest):
    return [list(z) for k in range(longest + 1) for z in product(range(1, vocab), repeat=k)]


def _value(z):
    return 0.5 * sum(z) - 1.5 * len(z)


def _trainer(policy, constraints=None, reward=None, prompts=(PROMPT, [3]), **config):
    reward = reward or SequenceReward(lambda zs: [_value(z) for z in zs])
    config = TrainConfig(**(SMALL | dict(conditioning="split_scale") | config))
    limits = constraints or Constraints(0, max_length=3)
    return Trainer(policy, prompts=prompts, reward=reward, constraints=limits, config=config)


def _fresh(policy):
    """An adapter that changes nothing yet, as load_policy makes it."""
    with torch.no_grad():
        for name, p in policy.parameters():
            if ".lora_B." in name:
                p.zero_()
    return policy


@pytest.mark.parametrize(("kind", "vocab"), [("adapter_scale", 6), ("split_scale", 4)])
def test_one_sampler_learns_all_temperatures(tiny_policy, kind, vocab, monkeypatch):
    """Trained at three temperatures, and as good at two that it never saw: "adapter_scale" on powers of the
    base's own q over 31 sequences, "split_scale" on those of another reward over 13."""
    policy = _fresh(tiny_policy(vocab=vocab, dtype=torch.float32, rank=8))
    constraints, space = Constraints(0, max_length=2), _space(vocab, 2)
    base = sequence_log_probs(PROMPT, space, policy=policy, constraints=constraints)[0]
    log_r = torch.tensor([_value(z) for z in space], dtype=torch.float64) if kind == "split_scale" else base
    known = {tuple(z): float(value) for z, value in zip(space, log_r, strict=True)}
    reward = SequenceReward(lambda zs: [known[tuple(z)] for z in zs])
    assert divergence(base, (log_r / 0.4).log_softmax(0), 0.0).tv > 0.3
    options = dict(conditioning=kind, steps=120, num_samples=48, replay_samples=0, learning_rate=1e-2)
    trainer = _trainer(policy, constraints, reward, [PROMPT], warmup_steps=10, **options)
    monkeypatch.setattr(trainer.explorer, "reward_temperature", lambda step, micro: TRAINED[step % 3])
    assert {trainer.step()["reward_temperature"] for _ in range(120)} == set(TRAINED)
    limits = dict(policy=policy, constraints=constraints)
    report = evaluate_temperatures(PROMPT, space, log_r, TRAINED + UNSEEN, **limits)
    assert max(row["tv"] for row in report.values()) <= 0.05
    assert max(row["log_z_error"] for row in report.values()) <= 0.1


def test_evaluation_is_that_of_the_target_at_each_temperature(tiny_policy):
    """At T = 1 "adapter_scale" is the base, of which everything is known."""
    policy = tiny_policy(vocab=4)
    constraints, space = Constraints(0, max_length=2), _space(4, 2)
    condition(policy, "adapter_scale", (0.4, 1.2))
    limits = dict(policy=policy, constraints=constraints)
    with policy.at_temperature(1.0):
        base, _ = sequence_log_probs(PROMPT, space, **limits)
    report = evaluate_temperatures(PROMPT, space, base + 0.3, [1.0, 0.5], **limits)
    assert list(report) == [1.0, 0.5] and report[1.0]["tv"] < 1e-9 < 0.1 < report[0.5]["tv"]
    assert report[1.0]["log_z"] == pytest.approx(0.3) and report[1.0]["log_z_error"] < 1e-9
    assert report[0.5]["log_z"] == pytest.approx(float(((base + 0.3) * 2).logsumexp(0)))
    with policy.at_temperature(0.5):
        log_q, _ = sequence_log_probs(PROMPT, space, **limits)
    want = 0.5 * float((log_q.exp() - (base * 2).softmax(0)).abs().sum())
    assert report[0.5]["tv"] == pytest.approx(want)
    with pytest.raises(InputError, match=r"log_reward must be \(13,\), got \(12,\)"):
        evaluate_temperatures(PROMPT, space, base[:-1], [1.0], **limits)
    with pytest.raises(InputError, match="temperature must be in the trained range"):
        evaluate_temperatures(PROMPT, space, base, [2.0], **limits)


def test_resume_is_bit_identical_to_the_uninterrupted_run(tiny_policy, tmp_path):
    options = dict(steps=5, accumulation=2, learning_rate=1e-2)
    straight = _trainer(tiny_policy(dtype=torch.float32), **options)
    straight.fit(tmp_path / "a")
    stopped = _trainer(tiny_policy(dtype=torch.float32), **options)
    assert not stopped.fit(tmp_path / "b", should_stop=lambda: stopped.steps_done == 3)
    resumed = _trainer(tiny_policy(dtype=torch.float32), **options)
    assert resumed.resume(tmp_path / "b") == 3
    assert resumed.fit(tmp_path / "b")
    want = dict(straight.policy.parameters())
    assert all(torch.equal(p, want[name]) for name, p in resumed.policy.parameters())
    assert resumed.buffer.state() == straight.buffer.state()
    assert (tmp_path / "b" / "checkpoints" / "step-00000005" / "conditioning.json").is_file()
    with pytest.raises(InputError, match="conditioning must be 'split_scale', got None; resume with"):
        _trainer(tiny_policy(dtype=torch.float32), conditioning=None, **options).resume(tmp_path / "b")


def test_every_micro_batch_has_a_temperature_of_its_own(tiny_policy, monkeypatch):
    """Which its draws, its replay and its scores see, and nothing afterwards, even where it fails."""
    policy, seen = tiny_policy(), []
    trainer = _trainer(policy, accumulation=3, target_temperatures=(0.5, 2.0))
    for place, name in (("behavior.sampler", "sample"), ("train", "add_gradients")):
        inner = globals()[name]

        def noted(*args, inner=inner, **options):
            seen.append((policy.conditioning.temperature, options.get("reward_temperature")))
            return inner(*args, **options)

        monkeypatch.setattr(f"fastgfn.{place}.{name}", noted)
    last = [trainer.step()["reward_temperature"] for _ in range(2)][-1]
    drawn, scored = seen[::2], seen[1::2]
    assert [t for t, _ in drawn] == [t for t, _ in scored] == [t for _, t in scored]
    assert len(set(drawn)) == 6 and all(0.5 <= t <= 2.0 for t, _ in drawn)
    assert policy.conditioning.temperature is None and last == drawn[-1][0]
    monkeypatch.setattr("fastgfn.train.pack", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step()
    assert policy.conditioning.temperature is None
    places = [trainer.explorer.reward_temperature(step, 0) for step in range(400)]
    assert sum(t < 1.25 for t in places) / 400 == pytest.approx(0.5, abs=0.07)


def test_replay_is_drawn_by_the_temperature_of_the_micro_batch(tiny_policy):
    """At a low temperature the best sequence comes first, at a high one the four are alike."""
    buffer = ReplayBuffer(4, duplicates="exact")
    tokens = torch.tensor([[1], [2], [3], [4]])
    zeros, ones = torch.zeros(4), torch.ones(4, dtype=torch.int64)
    rollouts = Rollouts(
        (torch.tensor(PROMPT),), zeros.long(), tokens, ones, zeros, Constraints(0, max_length=1)
    )
    buffer.add(rollouts, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))

    def share(temperature):
        rng = np.random.default_rng(0)
        drawn = (buffer.sample(rollouts, 1, rng, temperature=temperature) for _ in range(400))
        return sum(int(r.tokens[0, 0]) == 4 for r in drawn) / 400

    for temperature in (0.5, 1.0, 10.0):
        weights = [math.exp(v / temperature) for v in range(4)]
        assert share(temperature) == pytest.approx(weights[-1] / sum(weights), abs=0.08)


@pytest.mark.parametrize("max_tokens", [None, 12])
@pytest.mark.parametrize("objective", ["modified_subtb", "vargrad"])
def test_a_reward_temperature_for_every_prompt(tiny_policy, objective, max_tokens):
    """The gradient of prompts at their own temperatures is the mean of theirs alone."""
    policy, limits = tiny_policy(family="gpt2"), Constraints(0, min_length=1, max_length=4)
    reward = SequenceReward(lambda zs: [_value(z) for z in zs])
    temperatures, prompts = torch.tensor([0.5, 2.0, 0.8], dtype=torch.float64), [[1, 2], [3], [4, 5]]
    options = dict(policy=policy, reward=reward, objective=objective, max_tokens=max_tokens)

    def gradient(temperature, first=0, last=3):
        drawn = dict(constraints=limits, num_samples=6, first_trajectory=6 * first)
        tree = pack(sample(prompts[first:last], policy=policy, **drawn))
        for _, p in policy.parameters():
            p.grad = None
        result = add_gradients(tree, reward_temperature=temperature, **options)
        return result, torch.cat([p.grad.flatten() for _, p in policy.parameters()])

    whole, got = gradient(temperatures)
    alone = [gradient(float(t), i, i + 1) for i, t in enumerate(temperatures)]
    torch.testing.assert_close(whole.log_z, torch.cat([result.log_z for result, _ in alone]))
    torch.testing.assert_close(got, torch.stack([g for _, g in alone]).mean(0), rtol=1e-9, atol=1e-12)
    assert float(whole.loss) == pytest.approx(sum(float(result.loss) for result, _ in alone) / 3)
    for bad in (torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0, 1.0]), -1.0):
        with pytest.raises(InputError, match="reward_temperature must be"):
            gradient(bad)


def test_refuses_contradictory_settings(tiny_policy):
    with pytest.raises(InputError, match="conditioning must be one of .*got 'prompt'"):
        TrainConfig(conditioning="prompt")
    with pytest.raises(InputError, match="target_temperatures must be two numbers > 0"):
        TrainConfig(target_temperatures=(0.0, 1.0))
    with pytest.raises(InputError, match="target_temperatures must be ascending"):
        TrainConfig(target_temperatures=(1.0, 1.0))
    with pytest.raises(InputError, match=r"reward_temperature must be \(1.0, 1.0\) with a conditioning"):
        TrainConfig(conditioning="split_scale", reward_temperature=(1.0, 0.5))
    policy = tiny_policy()
    condition(policy, "split_scale", (0.4, 1.2))
    for wrong in (dict(conditioning=None), dict(target_temperatures=(0.4, 1.0))):
        with pytest.raises(InputError, match="target_temperatures must be .*train a conditioned adapter"):
            _trainer(policy, **wrong)
    assert _trainer(policy).policy is policy
