"""Objectives in the Trainer: to an exact posterior, with what is learned beside the policy resumed."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgfn.checkpoint import checkpoints, load_checkpoint
from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.objectives import REGISTRY
from fastgfn.packing import pack
from fastgfn.rewards import SequenceReward
from fastgfn.scoring import score
from fastgfn.train import Trainer
from fastgfn.types import Constraints, Rollouts

PROMPT = [1, 2]
SPACE = [list(z) for k in range(3) for z in product(range(1, 4), repeat=k)]
LIMITS = Constraints(0, max_length=2)


def _value(z):
    return 0.5 * sum(z) - 1.5 * len(z)


LOG_R = torch.tensor([_value(z) for z in SPACE], dtype=torch.float64)


def _trainer(policy, *, prompts=(PROMPT,), terminal_only=False, constraints=LIMITS, **config):
    reward = SequenceReward(lambda zs: [_value(z) for z in zs], terminal_only=terminal_only)
    config = TrainConfig(**(dict(warmup_steps=2, learning_rate=2e-2, num_samples=48) | config))
    return Trainer(policy, prompts=list(prompts), reward=reward, constraints=constraints, config=config)


def _prior(policy):
    """(S,) log p of every string under the base model."""
    tokens, lengths = torch.zeros(len(SPACE), 2, dtype=torch.int64), torch.tensor([len(z) for z in SPACE])
    for row, z in zip(tokens, SPACE, strict=True):
        row[: len(z)] = torch.tensor(z, dtype=torch.int64)
    zeros = torch.zeros(len(SPACE))
    tree = pack(Rollouts((torch.tensor(PROMPT),), lengths * 0, tokens, lengths, zeros, LIMITS))
    base = score(tree, policy=policy.reference)
    log_p = torch.zeros(len(SPACE), dtype=torch.float64) + base.log_pterm[tree.leaf]
    for n, leaf in enumerate(tree.leaf.tolist()):
        while leaf >= 0:
            log_p[n] += base.log_pf[leaf]
            leaf = int(tree.parent[leaf])
    return log_p


# objective settings; of `steps` the first `run` (or half) are taken, so that step sizes stay large
CASES = {
    "modified_db": dict(objective="modified_db", steps=90),
    "tb-scalar": dict(objective="tb", log_z="scalar", steps=90, terminal_only=True),
    "tb-head": dict(objective="tb", log_z="head", steps=90, run=90, learning_rate=1e-2, terminal_only=True),
    "rtb": dict(objective="rtb", steps=90, terminal_only=True),
    "rooted": dict(objective="rooted_prefix_tb", rooted_first=1, rooted_missing_reward=99.0, steps=90),
    "subtb": dict(objective="subtb", log_z="head", steps=120, terminal_only=True),
    "db": dict(objective="db", log_z="head", log_z_learning_rate=0.3, steps=180, terminal_only=True),
}


@pytest.mark.parametrize("case", CASES)
def test_learns_a_known_posterior(tiny_policy, case):
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8)
    log_r = LOG_R + _prior(policy) if case == "rtb" else LOG_R
    target = log_r.log_softmax(0)

    def distance():
        log_q, _ = sequence_log_probs(PROMPT, SPACE, policy=policy, constraints=LIMITS)
        return divergence(log_q, target, 0.0).tv

    assert distance() > 0.2
    options = dict(CASES[case])
    taken = options.pop("run", options["steps"] // 2)
    trainer = _trainer(policy, **options)
    for _ in range(taken):
        metrics = trainer.step()
    assert distance() <= 0.05
    log_z = metrics["log_z"] if "log_z" not in CASES[case] else metrics["learned_log_z"]
    assert log_z == pytest.approx(float(log_r.logsumexp(0)), abs=0.1)


def test_a_value_of_each_prompt_starts_at_its_first_estimate(tiny_policy):
    """Prompts that were not drawn yet have none; one value for all starts at the mean of the first."""
    prompts = [[1, 2], [3], [2]]
    common = dict(prompts=prompts, objective="tb", prompts_per_step=2, steps=3, log_z_learning_rate=1e-9)
    table = _trainer(tiny_policy(), log_z="per_prompt", **common)
    first = table.explorer.indices(0, 0)
    rest = ({0, 1, 2} - set(first)).pop()
    metrics = table.step()
    values = table.log_z.module.values.detach().clone()
    assert bool(values[rest].isnan()) and bool(values[first].isfinite().all())
    assert metrics["learned_log_z"] == pytest.approx(metrics["log_z"])
    table.step()
    again = table.log_z.module.values.detach()
    assert bool(again.isfinite().all()) and torch.allclose(again[first], values[first], atol=1e-6)
    scalar = _trainer(tiny_policy(), log_z="scalar", **common)
    scalar.step()
    assert float(scalar.log_z.module.values) == pytest.approx(metrics["log_z"], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(objective="tb", log_z="per_prompt"),
        dict(objective="subtb", log_z="head"),
    ],
    ids=["per_prompt", "head"],
)
def test_resume_is_bit_identical(tiny_policy, tmp_path, options):
    options = dict(steps=5, num_samples=6, checkpoint_every=2, prompts=[[1, 2], [3], [2]]) | options
    straight = _trainer(tiny_policy(dtype=torch.float32), **options)
    straight.fit(tmp_path / "a")
    stopped = _trainer(tiny_policy(dtype=torch.float32), **options)
    assert not stopped.fit(tmp_path / "b", should_stop=lambda: stopped.steps_done == 1)
    resumed = _trainer(tiny_policy(dtype=torch.float32), **options)
    assert resumed.resume(tmp_path / "b") == 1 and resumed.fit(tmp_path / "b")
    pairs = zip(
        resumed.policy.parameters() + resumed.log_z.parameters(),
        straight.policy.parameters() + straight.log_z.parameters(),
        strict=True,
    )
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    path = checkpoints(tmp_path / "b")[-1]
    assert set(load_file(path / "log_z.safetensors")) == {name for name, _ in straight.log_z.parameters()}
    assert not any("log_z" in key for key in load_file(path / "adapter_model.safetensors"))
    name, *names = learned = load_file(path / "log_z.safetensors")
    save_file({n: learned[n] for n in names}, path / "log_z.safetensors")
    with pytest.raises(InputError, match=f"log_z.safetensors must be of {name}, got .* alone; restore it"):
        load_checkpoint(path, resumed.policy, resumed.optimizer, resumed.log_z.parameters())
    (path / "log_z.safetensors").unlink()
    again = _trainer(tiny_policy(dtype=torch.float32), **options)
    with pytest.warns(UserWarning, match="passed over damaged step-00000005"):
        assert again.resume(tmp_path / "b") == 4


def test_a_run_from_before_learned_values_resumes(tiny_policy, tmp_path):
    _trainer(tiny_policy(dtype=torch.float32), steps=1, num_samples=4).fit(tmp_path)
    path = checkpoints(tmp_path)[-1]
    state = json.loads((path / "state.json").read_text())
    for key in ("log_z", "log_z_learning_rate", "residual_loss", "rtb_beta", "rooted_last"):
        del state["run"][key]
    (path / "state.json").write_text(json.dumps(state))
    assert not (path / "log_z.safetensors").exists()
    assert _trainer(tiny_policy(dtype=torch.float32), steps=1, num_samples=4).resume(tmp_path) == 1


@pytest.mark.parametrize("value", [float("inf"), -2e4])
def test_a_log_z_that_diverges_is_an_error(tiny_policy, value):
    trainer = _trainer(tiny_policy(), objective="tb", log_z="scalar", num_samples=4)
    trainer.step()
    weights = [p.detach().clone() for _, p in trainer.policy.parameters()]
    with torch.no_grad():
        trainer.log_z.module.values.fill_(value)
    want = r"the learned log Z\(X\) must be within 10000 nats of the estimate .* lower log_z_learning_rate"
    with pytest.raises(InputError, match=want):
        trainer.step()
    now = [p.detach() for _, p in trainer.policy.parameters()]
    assert trainer.steps_done == 1 and all(torch.equal(a, b) for a, b in zip(now, weights, strict=True))


def test_terminal_only_rewards_are_refused_where_prefixes_are_read(tiny_policy):
    policy = tiny_policy()
    for name, spec in REGISTRY.items():
        log_z = {"tb": "scalar", "subtb": "head", "db": "head"}.get(name, "estimate")
        options = dict(objective=name, log_z=log_z, terminal_only=True)
        if spec.reads_prefixes:
            with pytest.raises(InputError, match="set objective='vargrad'"):
                _trainer(policy, **options)
        else:
            _trainer(policy, **options)


def test_a_learned_value_is_refused_where_nothing_reads_it(tiny_policy):
    for name in ("modified_subtb", "modified_db", "interpolated_subtb"):
        with pytest.raises(
            InputError, match="config.log_z must be 'estimate' where s_0 can stop, got 'scalar'"
        ):
            _trainer(tiny_policy(), objective=name, log_z="scalar")
    limits = Constraints(0, min_length=1, max_length=2)
    # of a single sequence the estimate is its own log R - log q: no window would tell it from others
    for name in ("modified_subtb", "modified_db", "interpolated_subtb"):
        with pytest.raises(
            InputError, match="config.log_z must be learned where s_0 cannot stop .*num_samples"
        ):
            _trainer(tiny_policy(), objective=name, constraints=limits, num_samples=1)
    trainer = _trainer(tiny_policy(), constraints=limits, log_z="scalar", num_samples=8)
    first, second = trainer.step()["learned_log_z"], trainer.step()["learned_log_z"]
    assert 1e-3 < abs(first - second) < 1.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(objective="tb"), "log_z must be learned .*'vargrad' estimates it, got 'estimate'"),
        (dict(objective="vargrad", log_z="scalar"), "log_z must be 'estimate' .*try 'tb', got 'scalar'"),
        (dict(objective="subtb"), "log_z must be 'head', whose flows it reads.*, got 'estimate'"),
        (dict(objective="db", log_z="scalar"), "log_z must be 'head'"),
        (dict(objective="tb", log_z="scalar", include_sink=True), "include_sink must be False with"),
        (dict(objective="vargrad", subtb_lambda=0.5), "subtb_lambda must be 1.0 with objective='vargrad'"),
        (dict(rtb_beta=2.0), "rtb_beta must be 1.0 with .*it is of .*'rtb'"),
        (dict(objective="rtb", rtb_beta=0.0), "rtb_beta must be > 0"),
        (dict(objective="rtb", num_samples=1), "num_samples must be >= 2 with objective='rtb'"),
        (dict(residual_limit=1.0), "residual_limit must be None without residual_loss='clamped'"),
        (dict(residual_loss="clamped", residual_limit=-1.0), "residual_limit must be > 0 or None"),
        (dict(residual_loss="cube"), "residual_loss must be one of"),
        (dict(log_z="mean"), "log_z must be one of"),
        (dict(log_z_learning_rate=0.0), "log_z_learning_rate must be > 0"),
        (dict(log_z_learning_rate=0.05), "log_z_learning_rate must be 0.1 with log_z='estimate'"),
        (dict(objective="rooted_prefix_tb", rooted_first=3, rooted_last=2), "rooted_last must be >= rooted"),
        (dict(objective="rooted_prefix_tb", rooted_gamma=1.5), r"rooted_gamma must be in \[0, 1\]"),
        (dict(objective="interpolated_subtb", interpolation_segment=0), "interpolation_segment must be >= 1"),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(settings, match):
    with pytest.raises(InputError, match=f"TrainConfig: {match}"):
        TrainConfig(**settings)
