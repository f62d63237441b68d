import pytest

from fastgfn.checks import InputError
from fastgfn.config import Behavior, TrainConfig


def test_schedules():
    config = TrainConfig(
        steps=110,
        warmup_steps=10,
        learning_rate=2.0,
        schedule="cosine",
        reward_temperature=(1.0, 0.8),
        reward_horizon=50,
    )
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(9) == pytest.approx(2.0)
    assert config.learning_rate_at(60) == pytest.approx(1.0)
    assert config.learning_rate_at(110) == pytest.approx(0.0)
    assert config.reward_temperature_at(0) == 1.0
    assert config.reward_temperature_at(25) == pytest.approx(0.9)
    assert config.reward_temperature_at(500) == pytest.approx(0.8)
    assert TrainConfig(steps=110, schedule="constant").learning_rate_at(100) == 1e-3
    assert TrainConfig(steps=110, schedule="linear").learning_rate_at(60) == pytest.approx(5e-4)


def test_behaviours_move_along_their_horizons():
    config = Behavior(
        num_samples=6,
        epsilon=(0.4, 0.0),
        epsilon_horizon=10,
        replay_share=(0.0, 0.75),
        replay_horizon=4,
        local_search_samples=(0, 5),
        local_search_horizon=2,
        demonstration_samples=(3, 0),
        demonstration_horizon=6,
    )
    assert [config.epsilon_at(step) for step in (0, 5, 10, 99)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert [config.replay_samples_at(step) for step in (0, 2, 4, 9)] == [0, 4, 18, 18]
    assert [config.local_search_samples_at(step) for step in (0, 1, 2, 7)] == [0, 2, 5, 5]
    assert [config.demonstration_samples_at(step) for step in (0, 2, 4, 6)] == [3, 2, 1, 0]
    assert config.uses_buffer and not Behavior().uses_buffer
    assert Behavior(replay_samples=7).replay_samples_at(3) == 7
    settings = TrainConfig(**config.to_dict())
    assert settings.replay_samples_at(2) == 4 and set(config.to_dict()) < set(settings.to_dict())


def test_a_mapping_round_trips_and_an_unknown_key_names_the_closest():
    config = TrainConfig(steps=7, temperature_range=(0.9, 1.1), max_tokens=512, gradient_checkpointing=True)
    assert TrainConfig.from_dict(config.to_dict()) == config
    other = {"temperature_range": [0.9, 1.1], "steps": 7, "max_tokens": 512, "gradient_checkpointing": True}
    assert TrainConfig.from_dict(other) == config
    assert TrainConfig.from_dict({"max_tokens": None}) == TrainConfig()
    with pytest.raises(InputError, match="got 'learning_rat'; did you mean 'learning_rate'?"):
        TrainConfig.from_dict({"learning_rat": 1.0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("rollout_precision", "int4"),
        ("rollout_precision", "float16"),
        ("max_tokens", True),
        ("gradient_checkpointing", 1),
        ("gradient_checkpointing", "yes"),
        ("num_samples", 0),
        ("num_samples", -1),
        ("epsilon", (0.5, 1.5)),
        ("epsilon", 0.5),
        ("epsilon_horizon", 0),
        ("epsilon_share", 1.5),
        ("replay_share", (0.0, 1.0)),
        ("local_search_samples", (-1, 0)),
        ("local_search_samples", (4, float("inf"))),
        ("local_search_from", "worst"),
        ("local_search_accept", "annealed"),
        ("local_search_rounds", 0),
        ("demonstration_samples", (1,)),
        ("seed_prompt_samples", -1),
        ("seed_prompt_temperature", 0.0),
        ("importance_clip", (2.0, 1.0)),
        ("importance_clip", (0.0, 0.0)),
        ("importance_clip", (-1.0, 1.0)),
        ("importance_clip", 8.0),
        ("tempered_share", (0.5, 1.5)),
        ("adam_betas", (0.9, 1.0)),
        ("subtb_lambda", -0.1),
        ("temperature_range", (0.0, 1.0)),
        ("temperature_range", (2.0, 1.0)),
        ("reward_temperature", (1.0, float("nan"))),
        ("schedule", "step"),
        ("normalization", "mean"),
        ("objective", "ppo"),
        ("objective", None),
        ("learning_rate", 0.0),
        ("max_grad_norm", 0.0),
        ("replay_samples", -1),
        ("steps", "abc"),
        ("steps", None),
        ("steps", 1.5),
        ("num_samples", True),
        ("adam_betas", (0.9, "x")),
        ("learning_rate", float("inf")),
        ("replay_tolerance", "x"),
        ("replay_priority", "best"),
        ("seed", 2**63),
    ],
)
def test_refuses_bad_values(field, value):
    with pytest.raises(InputError, match=f"TrainConfig: {field} must be"):
        TrainConfig(**{field: value})


def test_vargrad_needs_two_sequences_of_a_prompt():
    want = "TrainConfig: num_samples must be >= 2 with objective='vargrad', got 1"
    with pytest.raises(InputError, match=want):
        TrainConfig(objective="vargrad", num_samples=1)
    TrainConfig(objective="vargrad", num_samples=1, replay_samples=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            dict(replay_samples=4, replay_share=(0.5, 0.5)),
            r"replay_share must be \(0, 0\) beside replay_samples",
        ),
        (dict(replay_share=(0.0, 0.75)), "replay_capacity must be >= 60, what replay_share=0.75 adds to"),
        (
            dict(num_samples=0, replay_share=(0.5, 0.0), demonstration_samples=(1, 1)),
            "where num_samples is 0",
        ),
        (
            dict(num_samples=0, replay_samples=4, epsilon=(0.1, 0.0)),
            r"epsilon must be \(0, 0\) where num_sam",
        ),
        (
            dict(num_samples=0, replay_samples=4, local_search_samples=(1, 1)),
            "must be at most num_samples = 0",
        ),
        (
            dict(num_samples=4, local_search_samples=(1, 5)),
            "at most num_samples = 4 .* or search from the buff",
        ),
        (
            dict(local_search_samples=(1, 1), local_search_from="buffer"),
            "must be 'best' or 'random' without re",
        ),
        (dict(num_samples=0, demonstration_samples=(4, 0)), "num_samples must be .* at every step, got 0"),
        (dict(num_samples=0, replay_samples=4, replay_max_age=9), "replay_max_age must be None where num_sa"),
        (
            dict(epsilon=(0.2, 0.1), epsilon_share=0.02),
            "epsilon_share must be a share that is one of num",
        ),
        (
            dict(num_samples=0, demonstration_samples=(1, 1), objective="vargrad"),
            "num_samples must be >= 2 with",
        ),
    ],
)
def test_refuses_settings_that_contradict_each_other(values, message):
    with pytest.raises(InputError, match=f"TrainConfig: .*{message}"):
        TrainConfig(**values)


def test_sequences_that_are_not_drawn_can_be_trained_on():
    TrainConfig(num_samples=0, replay_samples=4)
    TrainConfig(num_samples=0, replay_samples=4, replay_max_age=9, demonstration_samples=(2, 1))
    TrainConfig(num_samples=0, demonstration_samples=(2, 2), objective="vargrad")
    TrainConfig(num_samples=1, replay_share=(0.5, 0.5), objective="vargrad")
    TrainConfig(local_search_samples=(30, 30), local_search_from="buffer", replay_share=(0.1, 0.1))
    assert TrainConfig.from_dict({"importance_clip": [0.5, 8]}).importance_clip == (0.5, 8)
