import json
import math

import pytest
import torch
from evaluate_cases import Problem

from fastgfn.checks import InputError
from fastgfn.evaluate import (
    Target,
    diagnose,
    draw_exact,
    measure,
    prefix_survival,
    staleness,
    survival,
    temperature_sweep,
    termination,
)
from fastgfn.rollout import SamplingOptions
from fastgfn.types import Rollouts

BEHAVIORS = [
    pytest.param({}, id="policy"),
    pytest.param(dict(temperature=2.5), id="tempered"),
    pytest.param(dict(options=SamplingOptions(epsilon=0.7)), id="epsilon"),
]


@pytest.fixture
def problem(tiny_policy):
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0)
    return Problem(policy, 4, temperature=0.8, prompts=[[1, 2], [3]])


def _near(have, want, error):
    """Within four standard errors."""
    assert abs(float(have) - float(want)) <= 4 * float(error) + 1e-6, (have, want, error)


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_diagnostics_estimate_what_enumeration_computes(problem, behavior):
    num = 4096
    found = diagnose(problem.policy, num_samples=num, seed=1, **behavior, **problem.target)
    lengths, p = problem.lengths.double(), problem.log_target.exp()
    for g in range(2):
        log_q = problem.log_q(g)
        q, ratio = log_q.exp(), problem.log_r / 0.8 - log_q
        variance = (q * (ratio - (q * ratio).sum()) ** 2).sum()
        spread = (q * (ratio - (q * ratio).sum()) ** 4).sum().sqrt()
        # weights q / mu cost as many samples as staleness says
        error = spread * (3 / float(found.staleness.ess[g])) ** 0.5
        _near(found.policy_variance[g], variance, error)
        tail = 1 / float(found.ess[g]) ** 0.5
        _near(found.log_z[g], problem.log_z, tail)
        _near(found.termination.target_length[g], (p * lengths).sum(), tail)
        exact = survival(problem.lengths, p, 3)
        assert float((found.survival.target[g] - exact).abs().max()) <= 4 * 0.5 * tail
        if not behavior:
            assert float(found.ess[g]) / num == pytest.approx(
                math.exp(2 * problem.log_z - float((2 * ratio + log_q).logsumexp(0))), rel=0.1
            )
            exact = survival(problem.lengths, q, 3)
            assert float((found.survival.drawn[g] - exact).abs().max()) <= 4 * 0.5 / num**0.5
            _near(found.termination.length[g], (q * lengths).sum(), 1.5 / num**0.5)
            ends = problem.lengths < 3
            assert float(found.termination.cut_share[g]) == float(found.survival.drawn[g, 3])
            _near(found.termination.cut_share[g], q[~ends].sum(), 0.5 / num**0.5)
            assert abs(float(found.staleness.kl[g])) < 1e-6 and float(found.staleness.drift[g]) < 1e-5
            torch.testing.assert_close(found.variance[g], found.policy_variance[g], rtol=1e-4, atol=1e-6)
    if behavior:
        assert float(found.staleness.kl.min()) > 1e-2 and float(found.staleness.ess.max()) < 0.99 * num


def test_a_sweep_reweights_one_set_of_samples(problem):
    temperatures = [0.5, 0.8, 2.0]
    found = diagnose(problem.policy, num_samples=4096, seed=2, temperatures=temperatures, **problem.target)
    assert found.sweep.log_z.shape == (2, 3) and found.sweep.temperatures.tolist() == temperatures
    torch.testing.assert_close(found.sweep.log_z[:, 1], found.log_z)
    torch.testing.assert_close(found.sweep.ess[:, 1], found.ess)
    for k, temperature in enumerate(temperatures):
        log_z = float((problem.log_r / temperature).logsumexp(0))
        for g in range(2):
            _near(found.sweep.log_z[g, k], log_z, 1 / float(found.sweep.ess[g, k]) ** 0.5)
    default = diagnose(problem.policy, num_samples=8, **problem.target).sweep.temperatures
    assert default.tolist() == [0.4, 0.8, 1.6]


def test_a_sampler_of_the_target_has_no_variance_at_its_temperature_only(problem):
    """With log R = log q / 2 the policy samples R^(1/T) exactly at T = 1/2."""
    target = Target(problem.policy, **problem.target)
    samples = measure(target, target.draw(64, seed=0))
    samples.log_reward.copy_(samples.log_q / 2)
    sweep = temperature_sweep(samples, [0.5, 1.0])
    assert float(sweep.variance[:, 0].max()) < 1e-10 < 1e-2 < float(sweep.variance[:, 1].min())
    torch.testing.assert_close(sweep.ess[:, 0], torch.full((2,), 64.0, dtype=torch.float64))
    torch.testing.assert_close(sweep.log_z[:, 0], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)


def _rollouts(problem, sequences, log_behavior=math.nan):
    tokens = torch.tensor([z + [0] * (3 - len(z)) for z in sequences])
    return Rollouts(
        tuple(torch.tensor(p) for p in problem.prompts),
        torch.arange(2).repeat_interleave(len(sequences) // 2),
        tokens,
        torch.tensor([len(z) for z in sequences]),
        torch.full((len(sequences),), log_behavior),
        problem.constraints,
    )


def test_termination_of_given_sequences(problem):
    """The ends of sequences that nobody knows the density of: what depends on it is nan, nothing else."""
    given = _rollouts(problem, [[], [1], [2, 3, 1], [1, 1, 1], [3, 3, 3], [2, 2, 2]])
    samples = measure(Target(problem.policy, **problem.target), given)
    found = termination(samples, reward_temperature=0.8)
    log_q = problem.log_q(0)
    place = {tuple(z): i for i, z in enumerate(problem.space)}
    one = [log_q[i] for z, i in place.items() if z[:1] == (1,)]
    stop_after_one = log_q[place[(1,)]] - torch.stack(one).logsumexp(0)
    assert float(found.log_stop[0]) == pytest.approx(0.5 * float(log_q[place[()]] + stop_after_one), abs=1e-5)
    assert math.isnan(float(found.log_stop[1]))
    torch.testing.assert_close(found.cut_share, torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found.length, torch.tensor([4 / 3, 3.0], dtype=torch.float64))
    assert bool(found.target_length.isnan().all())
    running = prefix_survival(samples, reward_temperature=0.8)
    want = torch.tensor([1, 2 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(running.drawn[0], want)
    assert bool(running.target.isnan().all() & staleness(samples).drift.isnan().all())
    torch.testing.assert_close(samples.log_q[:2], torch.stack([log_q[place[()]], log_q[place[(1,)]]]))


def test_exact_draws_know_log_z(problem):
    drawn = draw_exact(
        problem.prompts,
        [problem.space] * 2,
        [problem.log_target] * 2,
        constraints=problem.constraints,
        num_samples=50,
    )
    found = diagnose(problem.policy, rollouts=drawn, **problem.target)
    assert found.num_samples.tolist() == [50, 50]
    assert float((found.log_z - problem.log_z).abs().max()) < 1e-5
    torch.testing.assert_close(found.ess, torch.full((2,), 50.0, dtype=torch.float64))
    torch.testing.assert_close(found.termination.length, found.termination.target_length)
    torch.testing.assert_close(found.survival.drawn, found.survival.target)


def test_staleness_sees_a_policy_that_has_moved(problem):
    target = Target(problem.policy, **problem.target)
    drawn = target.draw(512, seed=0)
    with torch.no_grad():
        for _, p in problem.policy.parameters():
            p.mul_(1.8)
    found = staleness(measure(target, drawn))
    assert float(found.kl.min()) > 0.01 and float(found.drift.min()) > 0.01
    assert float(found.ess.max()) < 0.95 * 512


def test_results_are_reproducible_and_json_ready(problem):
    def run(**options):
        return diagnose(problem.policy, num_samples=16, **(problem.target | options)).to_dict()

    first = run()
    assert first == run() != run(seed=1)
    read = json.loads(json.dumps(first))
    assert read["termination"]["length"] == first["termination"]["length"]
    assert len(read["survival"]["drawn"][0]) == 4
    assert run(max_tokens=7)["ess"] == pytest.approx(first["ess"], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_samples=0), "diagnose: num_samples must be an int >= 1, got 0"),
        (dict(temperatures=[]), "temperatures must be > 0 and finite, got"),
        (dict(temperatures=[1.0, -1.0]), "temperatures must be > 0 and finite, got"),
        (dict(options=SamplingOptions(top_k=2)), "a behaviour that can draw every sequence"),
        (dict(prompts=[]), "prompts must be at least one prompt"),
    ],
)
def test_refuses_bad_input(problem, changes, message):
    with pytest.raises(InputError, match=message):
        diagnose(problem.policy, **(problem.target | dict(num_samples=4) | changes))


def test_refuses_rollouts_that_do_not_fit(problem):
    given = _rollouts(problem, [[1], [2]])
    with pytest.raises(InputError, match=r"prompts\[1\] of the rollouts must be \[2\], got \[3\]"):
        diagnose(problem.policy, rollouts=given, **(problem.target | dict(prompts=[[1, 2], [2]])))
    given.group[1] = 0
    with pytest.raises(InputError, match=r"at least one trajectory of every prompt, got \[2, 0\]"):
        diagnose(problem.policy, rollouts=given, **problem.target)
