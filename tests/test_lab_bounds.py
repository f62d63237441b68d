"""Bounds and estimates of log Z on problems of the laboratory, against their exact log Z."""

import pytest
import torch

from fastgfn.evaluate import bounds, draw_exact
from fastgfn.lab.problems import load_problem
from fastgfn.lab.runs import make_config, make_trainer

# At an effective sample size of N / 2 the error of log Zhat is 1 / sqrt(N), to first order.
NUM = 6144


@pytest.mark.parametrize(("name", "seeds"), [("tiny-cold", 10), ("tiny-prompts", 5)])
def test_bounds_hold_and_the_estimate_is_right_in_20_of_20_cases(name, seeds):
    """Ten cases of either problem: seeds times prompts. The trained sampler is still far from the target."""
    problem = load_problem(name, seed=1)
    brief = dict(steps=100, num_samples=40, learning_rate=1e-2, warmup_steps=3)
    config = make_config(problem, "modified_subtb", "default", 1, brief)
    trainer = make_trainer(problem, config)
    for _ in range(config.steps):
        trainer.step()
    assert problem.evaluate()["tv"] > 0.02
    exact = problem.posteriors
    log_z = torch.tensor([posterior.log_z for posterior in exact], dtype=torch.float64)
    spaces, targets = [p.sequences for p in exact], [p.log_target for p in exact]
    target = dict(
        prompts=problem.prompts,
        constraints=problem.constraints,
        reward=problem.reward,
        reward_temperature=problem.reward_temperature,
    )
    cases = 0
    for seed in range(seeds):
        draws = draw_exact(
            problem.prompts, spaces, targets, constraints=problem.constraints, num_samples=128, seed=seed
        )
        found = bounds(
            problem.policy, draws=draws, num_samples=NUM, schedule=1, seed=seed, delta=1e-3, **target
        )
        assert bool((found.lower <= log_z).all() & (log_z <= found.upper).all())
        assert bool((found.ess >= NUM / 2).all())
        assert float((found.log_z - log_z).abs().max()) <= 0.02
        cases += len(log_z)
    assert cases == 10


def test_annealed_bounds_hold_too():
    """Several temperatures between q and R, on an untrained sampler."""
    problem = load_problem("tiny-cold", seed=0)
    (posterior,) = problem.posteriors
    target = dict(prompts=problem.prompts, constraints=problem.constraints)
    for seed in range(2):
        draws = draw_exact(
            sequences=[posterior.sequences],
            log_probs=[posterior.log_target],
            num_samples=64,
            seed=seed,
            **target,
        )
        found = bounds(
            problem.policy,
            draws=draws,
            num_samples=256,
            schedule=4,
            seed=seed,
            delta=1e-3,
            reward=problem.reward,
            reward_temperature=problem.reward_temperature,
            **target,
        )
        assert bool((found.lower <= posterior.log_z).all() & (posterior.log_z <= found.upper).all())
        assert float((found.log_z - posterior.log_z).abs()) <= 0.5
