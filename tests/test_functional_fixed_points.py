"""Every objective and its gradient are 0 at the fixed point that its docstring states, on all strings."""

import math

import pytest
import torch
from loss_cases import World, f64, is_stationary

import fastgfn.functional as F
from fastgfn.ops.residual import LOSSES


def random_world(seed=3, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return World(lambda s: 2 * float(torch.randn((), generator=generator)), **kwargs)


@pytest.mark.parametrize("loss", LOSSES)
def test_posterior_is_the_fixed_point(loss):
    world = random_world()
    log_pf, log_reward, lengths = world.with_stop()
    log_pf.requires_grad_()
    log_z = f64(world.log_z).requires_grad_()
    value = F.trajectory_balance_loss(log_pf, log_reward, lengths, log_z=log_z, loss=loss)
    assert is_stationary(value, (log_pf, log_z))
    assert is_stationary(F.vargrad_loss(log_pf, log_reward, lengths, loss=loss), (log_pf,))
    off = F.vargrad_loss(log_pf.detach(), log_reward + torch.arange(len(lengths)), lengths, loss=loss)
    assert off > 0.1


def test_fixed_point_of_relative_trajectory_balance():
    prior, reward, beta = random_world(1), random_world(2), 0.6
    post = World(reward.log_r.get, log_target=lambda s: prior.log_r[s] - prior.log_z + beta * reward.log_r[s])
    log_pf, log_reward, lengths = post.with_stop()
    log_pf.requires_grad_()
    log_z = f64(post.log_z).requires_grad_()
    args = log_pf, prior.with_stop()[0], log_reward, lengths
    for half in (False, True):
        value = F.relative_trajectory_balance_loss(*args, beta=beta, log_z=log_z, half=half)
        assert is_stationary(value, (log_pf, log_z))
    assert is_stationary(F.relative_trajectory_balance_loss(*args, beta=beta), (log_pf,))


@pytest.mark.parametrize("with_prior", [False, True])
def test_fixed_point_of_length_normalisation_is_not_the_posterior(with_prior):
    prior, reward, beta = random_world(1), random_world(2), 1.3
    actions = {s: len(s) + 1 for s in reward.strings}

    def log_target(log_z):
        base = {s: prior.log_r[s] - prior.log_z if with_prior else 0.0 for s in actions}
        return {s: m * (beta * reward.log_r[s] - log_z) + base[s] for s, m in actions.items()}

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(math.exp(v) for v in log_target(middle).values())
        low, high = (middle, high) if total > 1 else (low, middle)
    target = log_target(low)
    world = World(reward.log_r.get, log_target=target.get)
    assert abs(world.log_z) < 1e-12
    log_pf, log_reward, lengths = world.with_stop()
    log_pf.requires_grad_()
    log_z = f64(low).requires_grad_()
    options = dict(beta=beta, length_normalize=True)
    if with_prior:
        options["log_prior"] = prior.with_stop()[0]
    value = F.trajectory_balance_loss(log_pf, log_reward, lengths, log_z=log_z, **options)
    assert is_stationary(value, (log_pf, log_z))
    plain = {s: beta * reward.log_r[s] + (prior.log_r[s] if with_prior else 0.0) for s in actions}
    total = sum(math.exp(v) for v in plain.values())
    distance = 0.5 * sum(abs(math.exp(plain[s]) / total - math.exp(target[s])) for s in actions)
    assert distance > 0.1
