"""A Trainer that replays: its rewards in factors, and every setting over a stop."""

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.replay import ReplayBuffer
from fastgfn.rewards import ProductReward, SequenceReward
from fastgfn.train import Trainer
from fastgfn.types import Constraints

SMALL = dict(num_samples=8, replay_samples=4, replay_capacity=16, warmup_steps=2)


def _embed(sequences):
    return torch.tensor([[1.0] + [float(z.count(t)) for t in range(13)] for z in sequences])


def _trainer(policy, reward=None, prompts=((1, 2), (3,)), embed=None, **config):
    return Trainer(
        policy,
        prompts=prompts,
        reward=reward or SequenceReward(lambda zs: [0.5 * sum(z) - 1.5 * len(z) for z in zs]),
        constraints=Constraints(0, max_length=3),
        config=TrainConfig(**(SMALL | config)),
        embed=embed,
    )


@pytest.mark.parametrize("max_tokens", [None, 9])
def test_a_product_is_stored_in_factors_and_tempered_again(tiny_policy, max_tokens, tmp_path, monkeypatch):
    """As the reward at the step's temperatures; what is stored does not depend on them, nor on the parts."""
    factors = {"sum": lambda z: 0.5 * sum(z), "length": lambda z: -1.5 * len(z)}
    rewards = {k: SequenceReward(lambda zs, f=f: [f(z) for z in zs]) for k, f in factors.items()}
    product = ProductReward(rewards, temperatures={"sum": (4.0, 1.0, 2)})
    asked = []
    sample = ReplayBuffer.sample

    def watched(buffer, *args, **options):
        asked.append((options["version"], options["temperature"], buffer.temperatures))
        return sample(buffer, *args, **options)

    monkeypatch.setattr(ReplayBuffer, "sample", watched)
    common = dict(
        prompts=[[1, 2]], reward_temperature=(3.0, 1.0), reward_horizon=2, replay_duplicates="exact"
    )
    trainer = _trainer(tiny_policy(dtype=torch.float32), product, max_tokens=max_tokens, **common)
    plain = _trainer(
        tiny_policy(dtype=torch.float32), ProductReward(rewards, temperatures={"sum": 4.0}), **common
    )
    first = [t.step() for t in (trainer, plain)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-4)
    for _ in range(3):
        trainer.step()
    assert asked[0] == (0, 3.0, (4.0, 1.0))
    late = [(2, 1.0, (1.0, 1.0)), (3, 1.0, (1.0, 1.0))]
    assert [a for a in asked if a[0]] == [(1, 2.0, (2.5, 1.0)), *late]
    stored = trainer.buffer.entries([1, 2])
    assert {e.version for e in stored} > {0} and len(stored) == 16
    for e in stored:
        assert e.factors == (factors["sum"](e.tokens), factors["length"](e.tokens))
        assert e.log_behavior < 0
    # the reward of one factor cannot take this run over
    trainer.save(tmp_path)
    one = _trainer(tiny_policy(dtype=torch.float32), max_tokens=max_tokens, **common)
    with pytest.raises(InputError, match=r"reward factors must be \['sum', 'length'\], got \['log_reward'\]"):
        one.resume(tmp_path)
    # nor can other temperatures
    product = ProductReward(rewards, temperatures={"sum": (2.0, 1.0, 2)})
    other = _trainer(tiny_policy(dtype=torch.float32), product, max_tokens=max_tokens, **common)
    want = (
        r"temperatures of the factors must be \[\[4.0, 1.0, 2\], .*, got \[\[2.0, 1.0, 2\], .*; resume with"
    )
    with pytest.raises(InputError, match=want):
        other.resume(tmp_path)


@pytest.mark.parametrize("given", [[], [(0, [2]), (0, [1, 1, 1])]], ids=["drawn", "given"])
def test_what_stays_is_the_best_of_the_step_before_anything_is_replayed(tiny_policy, given):
    """Under the temperatures of the step, also where the share of replay starts at 0 and in what is given."""
    rewards = {
        "sum": SequenceReward(lambda zs: [float(sum(z)) for z in zs]),
        "length": SequenceReward(lambda zs: [-20.0 * len(z) for z in zs]),
    }
    trainer = Trainer(
        tiny_policy(dtype=torch.float32),
        prompts=[[1, 2]],
        reward=ProductReward(rewards, temperatures={"length": (100.0, 1.0, 50)}),
        constraints=Constraints(0, max_length=3),
        config=TrainConfig(
            num_samples=20, replay_share=(0.0, 0.05), replay_horizon=50, replay_capacity=1,
            replay_duplicates="exact",
        ),
        demonstrations=given,
    )  # fmt: skip
    drawn = trainer.explorer.draw(0, 0, reward=trainer.reward.at(0)).fresh.sequences()
    if given:
        drawn = [z for _, z in given]
        trainer.explorer.fill(reward=trainer.reward.at(0))
    else:
        trainer.step()
    now, last = (max((sum(z) - 20.0 * len(z) / t, tuple(z)) for z in drawn)[1] for t in (100.0, 1.0))
    assert now != last and [e.tokens for e in trainer.buffer.entries([1, 2])] == [now]


@pytest.mark.parametrize(
    "options",
    [
        dict(replay_priority="mix", replay_selection="submodular"),
        dict(replay_priority="recency", replay_half_life=0.0, replay_max_age=2),
        dict(replay_priority="uniform", replay_selection="length_balanced", replay_keep="submodular"),
        dict(replay_duplicates="embedding", replay_tolerance=0.05, embed=_embed),
    ],
)
def test_every_kind_of_replay_resumes_as_if_it_had_not_stopped(tiny_policy, tmp_path, options):
    straight, stopped, resumed = (
        _trainer(tiny_policy(dtype=torch.float32), steps=4, replay_capacity=6, **options) for _ in range(3)
    )
    want = [straight.step() for _ in range(4)]
    got = [stopped.step() for _ in range(2)]
    stopped.save(tmp_path)
    assert resumed.resume(tmp_path) == 2
    assert got + [resumed.step() for _ in range(2)] == want
    assert resumed.buffer.state() == straight.buffer.state()
    ages = [4 - e.version for p in ([1, 2], [3]) for e in resumed.buffer.entries(p)]
    assert ages and max(ages) <= (options.get("replay_max_age") or 9) + 1


def test_embeddings_have_to_be_given(tiny_policy):
    with pytest.raises(InputError, match="embed must be a callable with duplicates='embedding', got None"):
        _trainer(tiny_policy(), replay_duplicates="embedding")
    for field, value, want in (
        ("replay_priority", "newest", "'reward' or"),
        ("replay_selection", "all", "'top' or 'submodular'"),
        ("replay_keep", "all", "'top' or 'submodular'"),
        ("replay_duplicates", "none", "'near' or"),
        ("replay_half_life", -1.0, ">= 0"),
        ("replay_recency_share", 1.5, "in"),
        ("replay_max_age", 0, ">= 1 or None"),
    ):
        with pytest.raises(InputError, match=f"TrainConfig: {field} must be {want}"):
            TrainConfig(**{field: value})
