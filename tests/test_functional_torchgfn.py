"""The padded losses against torchgfn 2.4.1, in float64: values, and gradients of policies and flows.

Without torchgfn, which `make test-torchgfn` installs apart, the module is skipped; the equations are computed
independently in the other tests.
"""

import pytest
import torch

pytest.importorskip("gfn", reason="see `make test-torchgfn`")

from gfn.estimators import DiscretePolicyEstimator, ScalarEstimator
from gfn.gflownet import (
    DBGFlowNet,
    LogPartitionVarianceGFlowNet,
    ModifiedDBGFlowNet,
    SubTBGFlowNet,
    TBGFlowNet,
)
from gfn.gflownet.losses import HalfSquaredLoss, LinexLoss, ShiftedCoshLoss
from gfn.gflownet.trajectory_balance import (
    RelativeLogPartitionVarianceGFlowNet,
    RelativeTrajectoryBalanceGFlowNet,
    TrustPCLGFlowNet,
)
from gfn.gym import HyperGrid
from gfn.preprocessors import KHotPreprocessor
from gfn.samplers import Sampler
from gfn.utils.modules import MLP

import fastgfn.functional as F

EXPRESSIBLE = {
    "DB": (0.0, "batch"),
    "ModifiedDB": (0.0, "trajectory"),
    "equal": (1.0, "batch"),
    "equal_within": (1.0, "trajectory"),
    "geometric_within": (0.9, "trajectory"),
}


class Grid:
    """A small hyper-grid, both policies, state flows, a prior and 24 ragged trajectories."""

    def __init__(self):
        torch.manual_seed(0)
        self.env = HyperGrid(ndim=2, height=4, validate_modes=False)
        make = KHotPreprocessor(height=4, ndim=2)

        def policy(is_backward=False):
            actions = self.env.n_actions - is_backward
            module = MLP(input_dim=make.output_dim, output_dim=actions, hidden_dim=8, n_hidden_layers=1)
            return DiscretePolicyEstimator(module, self.env.n_actions, make, is_backward=is_backward)

        self.pf, self.pb, self.prior = policy(), policy(is_backward=True), policy()
        flows = MLP(input_dim=make.output_dim, output_dim=1, hidden_dim=8, n_hidden_layers=1)
        self.flows = ScalarEstimator(flows, make)
        self.prior.requires_grad_(False)
        self.batch = Sampler(self.pf).sample_trajectories(self.env, n=24, save_logprobs=False)
        self.lengths = self.batch.terminating_idx
        assert len(self.lengths.unique()) > 3
        self.parameters = [
            p for part in (self.pf, self.pb, self.flows) for p in part.parameters() if p.requires_grad
        ]

    def log_probs(self, policy=None, pb="own"):
        """(log_pf, log_pb), each (N, T)."""
        model = TBGFlowNet(policy or self.pf, self.pb if pb == "own" else None, constant_pb=pb is None)
        return [x.T for x in model.get_pfs_and_pbs(self.batch)]

    def log_flow(self):
        """(N, T + 1), log R in the column of the sink."""
        model = SubTBGFlowNet(self.pf, self.pb, self.flows)
        flows = model.calculate_log_state_flows(self.env, self.batch, self.log_probs()[0].T).T
        flows = torch.nn.functional.pad(flows, (0, 1))
        return flows.scatter(1, self.lengths[:, None].long(), self.batch.log_rewards[:, None])

    def compare(self, theirs, ours):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-10, atol=1e-10)
        grads = [
            torch.autograd.grad(x.sum(), self.parameters, allow_unused=True, retain_graph=True)
            for x in (theirs, ours)
        ]
        used = [i for i, g in enumerate(grads[0]) if g is not None]
        assert used and any(bool(grads[0][i].any()) for i in used)
        for i in used:
            torch.testing.assert_close(grads[1][i], grads[0][i], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def grid():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield Grid()
    torch.set_default_dtype(before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ("squared", None),
        ("half_squared", HalfSquaredLoss()),
        ("shifted_cosh", ShiftedCoshLoss()),
        ("linex", LinexLoss()),
    ],
)
def test_trajectory_balance(grid, loss, theirs, reduction):
    log_z = torch.tensor(0.7, requires_grad=True)
    model = TBGFlowNet(grid.pf, grid.pb, logZ=torch.nn.Parameter(log_z.detach().clone()), loss_fn=theirs)
    want = model.loss(grid.env, grid.batch, reduction=reduction)
    log_pf, log_pb = grid.log_probs()
    got = F.trajectory_balance_loss(
        log_pf,
        grid.batch.log_rewards,
        grid.lengths,
        log_z=log_z,
        log_pb=log_pb,
        loss=loss,
        reduction=reduction,
    )
    grid.compare(want, got)
    pair = torch.autograd.grad(want.sum(), model.logZ)[0], torch.autograd.grad(got.sum(), log_z)[0]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def test_log_partition_variance(grid):
    want = LogPartitionVarianceGFlowNet(grid.pf, grid.pb).loss(grid.env, grid.batch)
    log_pf, log_pb = grid.log_probs()
    grid.compare(want, F.vargrad_loss(log_pf, grid.batch.log_rewards, grid.lengths, log_pb=log_pb))


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_relative_trajectory_balance(grid, beta):
    """Theirs halves the square; trust-PCL is 1 / beta^2 times it."""
    log_z, rewards = torch.tensor(-0.3), grid.batch.log_rewards
    log_pf, _ = grid.log_probs(pb=None)
    log_prior = grid.log_probs(grid.prior, pb=None)[0].detach()
    model = RelativeTrajectoryBalanceGFlowNet(grid.pf, grid.prior, init_logZ=-0.3, beta=beta)
    shared = dict(beta=beta, log_z=log_z, half=True)
    ours = F.relative_trajectory_balance_loss(log_pf, log_prior, rewards, grid.lengths, **shared)
    grid.compare(model.loss(grid.env, grid.batch), ours)
    model = TrustPCLGFlowNet(grid.pf, grid.prior, alpha=1 / beta, init_v_soft_s0=-0.3 / beta)
    grid.compare(model.loss(grid.env, grid.batch), ours / beta**2)
    model = RelativeLogPartitionVarianceGFlowNet(grid.pf, grid.prior, beta=beta)
    shared = dict(beta=beta, half=True)
    ours = F.relative_trajectory_balance_loss(log_pf, log_prior, rewards, grid.lengths, **shared)
    grid.compare(model.loss(grid.env, grid.batch), ours)


@pytest.mark.parametrize("loss", ["squared", "shifted_cosh"])
@pytest.mark.parametrize("weighting", EXPRESSIBLE)
def test_sub_trajectory_balance(grid, weighting, loss):
    theirs = ShiftedCoshLoss() if loss == "shifted_cosh" else None
    model = SubTBGFlowNet(grid.pf, grid.pb, grid.flows, weighting=weighting, lamda=0.9, loss_fn=theirs)
    log_pf, log_pb = grid.log_probs()
    subtb_lambda, normalization = EXPRESSIBLE[weighting]
    options = dict(log_pb=log_pb, normalization=normalization, loss=loss)
    args = log_pf, grid.log_flow(), grid.lengths
    got = F.subtb_loss(*args, subtb_lambda=subtb_lambda, **options)
    grid.compare(model.loss(grid.env, grid.batch), got)
    if subtb_lambda == 0:
        grid.compare(model.loss(grid.env, grid.batch), F.detailed_balance_loss(*args, **options))


def test_one_span_of_sub_trajectory_balance(grid):
    """Their weighting TB takes the window from s_0 to the sink: log Z is the flow of s_0."""
    model = SubTBGFlowNet(grid.pf, grid.pb, grid.flows, weighting="TB")
    log_pf, log_pb = grid.log_probs()
    log_z = grid.log_flow()[:, 0]
    args = log_pf, grid.batch.log_rewards, grid.lengths
    want = model.loss(grid.env, grid.batch)
    grid.compare(want, F.trajectory_balance_loss(*args, log_pb=log_pb, log_z=log_z))


def test_detailed_balance(grid):
    model = DBGFlowNet(grid.pf, grid.pb, grid.flows)
    want = model.loss(grid.env, model.to_training_samples(grid.batch))
    log_pf, log_pb = grid.log_probs()
    grid.compare(want, F.detailed_balance_loss(log_pf, grid.log_flow(), grid.lengths, log_pb=log_pb))


@pytest.mark.parametrize("tree", [True, False])
def test_modified_detailed_balance(grid, tree):
    """Theirs has no transition for the stop: a row has one less."""
    pb = None if tree else grid.pb
    model = ModifiedDBGFlowNet(grid.pf, pb, constant_pb=tree)
    want = model.loss(grid.env, model.to_training_samples(grid.batch))
    log_pf, log_pb = (x[:, :-1] for x in grid.log_probs(pb=None if tree else "own"))
    states = grid.batch.states[:-1]
    exits = torch.full((*states.batch_shape, 1), grid.env.n_actions - 1)
    mask = ~states.is_sink_state
    distribution = grid.pf.to_probability_distribution(states[mask], grid.pf(states[mask]))
    log_pterm, log_reward = (torch.full(mask.shape, torch.nan) for _ in range(2))
    log_pterm = log_pterm.masked_scatter(mask, distribution.log_prob(exits[mask])).T
    log_reward = log_reward.masked_scatter(mask, grid.env.log_reward(states[mask])).T
    lengths = grid.lengths - 1
    if tree:
        got = F.modified_detailed_balance_loss(log_pf, log_pterm, log_reward, lengths)
    else:
        got = F.detailed_balance_loss(log_pf, log_reward - log_pterm, lengths, log_pb=log_pb)
    grid.compare(want, got)
