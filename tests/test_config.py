import pytest

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig


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
        ("tempered_share", (0.5, 1.5)),
        ("adam_betas", (0.9, 1.0)),
        ("subtb_lambda", -0.1),
        ("temperature_range", (0.0, 1.0)),
        ("temperature_range", (2.0, 1.0)),
        ("reward_temperature", (1.0, float("nan"))),
        ("schedule", "step"),
        ("normalization", "mean"),
        ("objective", "tb"),
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
