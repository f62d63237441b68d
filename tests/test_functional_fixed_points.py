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


@pytest.mark.parametrize("loss", LOSSES)
def test_posterior_is_the_fixed_point_of_the_losses_over_prefixes(loss):
    world = random_world()
    leaves = [world.log_pf.requires_grad_(), world.log_pterm.requires_grad_()]
    args = *leaves, world.log_reward, world.lengths
    for subtb_lambda in (0.0, 0.7, 1.0):
        options = dict(subtb_lambda=subtb_lambda, loss=loss)
        assert is_stationary(F.modified_subtb_loss(*args, **options), leaves)
        assert is_stationary(F.modified_subtb_loss(*args, **options, include_sink=True), leaves)
    assert is_stationary(F.modified_detailed_balance_loss(*args, loss=loss), leaves)
    log_z = f64(world.log_z).requires_grad_()
    value = F.rooted_prefix_tb_loss(*args, log_z=log_z, k_min=1, missing_reward=-99.0, loss=loss)
    assert is_stationary(value, [*leaves, log_z])
    assert is_stationary(F.rooted_prefix_tb_loss(*args, missing_reward=-99.0, loss=loss), leaves)
    off = *leaves, world.log_reward + world.log_reward.square(), world.lengths
    for function in (F.modified_subtb_loss, F.modified_detailed_balance_loss, F.rooted_prefix_tb_loss):
        assert function(*off, loss=loss) > 0.1


@pytest.mark.parametrize("loss", ["squared", "linex"])
def test_posterior_is_the_fixed_point_with_explicit_flows(loss):
    """States s_0..s_n and the sink, the stop last: log F(s) = log Z + log q(reach s), log F(sink) = log R."""
    world = random_world()
    log_pf, log_reward, lengths = world.with_stop()
    reached = torch.nn.functional.pad(torch.where(log_pf.isnan(), 0, log_pf).cumsum(1), (1, 0))
    log_flow = world.log_z + reached
    log_flow[torch.arange(len(lengths)), lengths] = log_reward
    leaves = [log_pf.requires_grad_(), log_flow.requires_grad_()]
    for subtb_lambda in (0.0, 0.8, 1.0):
        assert is_stationary(F.subtb_loss(*leaves, lengths, subtb_lambda=subtb_lambda, loss=loss), leaves)
    assert is_stationary(F.detailed_balance_loss(*leaves, lengths, loss=loss), leaves)


def test_posterior_is_the_fixed_point_where_short_prefixes_may_not_stop():
    """The anchor is log Z; strings below the minimum length have no reward."""
    full = random_world()
    world = World(full.log_r.get, log_target=lambda s: full.log_r[s] if len(s) >= 2 else -math.inf)
    rows = world.lengths >= 2
    may_stop = (torch.arange(4) >= 2).expand(int(rows.sum()), 4)
    leaves = [x[rows].requires_grad_() for x in (world.log_pf, world.log_pterm)]
    args = *leaves, world.log_reward[rows], world.lengths[rows]
    for log_z in (None, f64(world.log_z)):
        options = dict(terminable=may_stop, log_z=log_z)
        for subtb_lambda in (0.0, 0.5, 1.0):
            value = F.modified_subtb_loss(*args, subtb_lambda=subtb_lambda, **options)
            assert is_stationary(value, leaves)
        assert is_stationary(F.rooted_prefix_tb_loss(*args, missing_reward=-99.0, **options), leaves)
    assert F.modified_subtb_loss(*args, terminable=may_stop, log_z=f64(world.log_z + 1)) > 0.1


def chains(width=5, seed=5):
    """Trajectories that share s_0 alone, so that each interpolates and corrects its prefixes by itself."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 4, 2, 5])
    log_pf = -torch.rand(4, width, generator=generator, dtype=torch.float64)
    log_reward = 2 * torch.rand(4, width + 1, generator=generator, dtype=torch.float64)
    log_reward[:, 0] = 1.3
    return log_pf, log_reward, lengths


def reached(log_pf):
    return torch.nn.functional.pad(log_pf.cumsum(1), (1, 0))


def test_fixed_point_of_interpolated_rewards_is_not_the_posterior():
    log_pf, log_reward, lengths = chains()
    shown = F.interpolated_log_reward(log_reward, lengths, 2)
    log_pterm = shown - reached(log_pf) - 4.0
    leaves = [log_pf.requires_grad_(), log_pterm.detach().requires_grad_()]
    args = *leaves, log_reward, lengths
    assert is_stationary(F.interpolated_subtb_loss(*args, segment=2), leaves)
    # There log q - log R varies along a trajectory: q is not R's posterior.
    assert F.modified_subtb_loss(*args) > 0.01
    linear = F.interpolated_log_reward(log_reward, lengths, 2)
    assert is_stationary(F.interpolated_subtb_loss(*leaves, linear, lengths, segment=1), leaves)
    # At the posterior the loss is positive wherever log R is not linear between the knots.
    world = random_world()
    exact = world.log_pf, world.log_pterm, world.log_reward, world.lengths
    assert F.interpolated_subtb_loss(*exact, segment=2) > 0.1


def test_fixed_point_of_rooted_prefixes_on_sparse_rewards_is_not_the_posterior():
    """U_n = -log Z and U_k = U_0 - alpha_k (u_k - u_k^tgt): prefixes without a reward stop more often."""
    log_pf, log_reward, lengths = chains()
    rows = torch.arange(4)
    is_end = torch.arange(6) == lengths[:, None]
    log_reward = torch.where(is_end, log_reward + 1, 0)
    log_z, options = f64(2.5), dict(k_min=1, gamma=0.7)
    log_pterm = log_reward - reached(log_pf) - log_z
    before, _ = F.rooted_prefix_terms(log_pf, log_pterm, log_reward, lengths, **options)
    log_pterm = (log_pterm - before).requires_grad_()
    leaves = [log_pf.requires_grad_(), log_pterm, log_z.requires_grad_()]
    value = F.rooted_prefix_tb_loss(*leaves[:2], log_reward, lengths, log_z=log_z, **options)
    assert is_stationary(value, leaves)
    moved = before.abs().amax(1)
    assert bool((before[rows, lengths].abs() < 1e-12).all()) and bool((moved > 0.1).all())
    # So the two terms cannot both be 0 at the posterior, where U is the same for every prefix.
    sparse = World(lambda s: 2.0 if len(s) == 3 else 0.0)
    exact = sparse.log_pf, sparse.log_pterm, sparse.log_reward, sparse.lengths
    posterior = F.rooted_prefix_tb_loss(*exact, log_z=f64(sparse.log_z), k_min=1)
    assert posterior > 0.01
    assert F.rooted_prefix_tb_loss(*exact, log_z=f64(sparse.log_z), prefix_weight=0.0) < 1e-20


def test_clamped_residuals_leave_far_trajectories_where_they_are():
    """A far start is stationary though not at 0: the limit is a trade against outliers, not a fixed point."""
    world = random_world()
    log_pf, log_reward, lengths = world.with_stop()
    log_pf.requires_grad_()
    options = dict(log_z=f64(world.log_z + 50.0), loss="clamped", residual_limit=10.0)
    value = F.trajectory_balance_loss(log_pf, log_reward, lengths, **options)
    assert value.item() == 100.0 and not torch.autograd.grad(value, log_pf)[0].any()
