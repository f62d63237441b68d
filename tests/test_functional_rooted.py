"""Rooted-prefix trajectory balance: the definition in Python floats, stop-gradients, refusals."""

import math

import pytest
import torch
from loss_cases import close, f64, padded_rows

import fastgfn.functional as F
from fastgfn.ops.residual import LOSSES
from fastgfn.reference.residual import residual_loss

GROUPS = torch.tensor([7, 7, -2, 7, -2, 30])
COUNTS = torch.tensor([2, 1, 3, 1, 0, 1])
LENGTHS = (4, 1, 6, 0, 5, 6)
DEFAULTS = dict(
    prior_scale=1.0,
    k_min=2,
    k_max=None,
    subtb_lambda=1.0,
    gamma=0.99,
    max_share=0.5,
    soft_beta=5.0,
    soft_rho=0.0,
    missing_reward=0.0,
    tolerance=1e-6,
)
SETTINGS = {
    "defaults": {},
    "all_prefixes": dict(k_min=1, gamma=0.8, soft_rho=0.3, soft_beta=2.0, max_share=0.8, subtb_lambda=0.7),
    "horizon": dict(k_min=1, k_max=5, gamma=0.5, subtb_lambda=0.0),
    "floor": dict(missing_reward=-4.0, tolerance=0.5, soft_rho=0.1),
    "maximum": dict(max_share=1.0),
    "no_share": dict(max_share=0.0),
}


def batch(dtype=torch.float64):
    """(log_pf, log_pterm, log_reward, lengths) and log_prior; every second reward is missing (0)."""
    log_pf, states, lengths = padded_rows(LENGTHS, width=6, dtype=dtype)
    log_reward = 3 * torch.rand(6, 7).to(dtype)
    log_reward[:, 1::2] = 0.0
    log_reward[:, 2] = -4.2
    log_reward = log_reward.masked_fill(states[1].isnan(), torch.nan)
    return (log_pf, states[0], log_reward, lengths), states[1]


def terminable(seed=0):
    """Some states may not stop, all whole trajectories may."""
    may = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    may[torch.arange(6), torch.tensor(LENGTHS)] = True
    may[:3, 0], may[4, 0] = False, True
    return may


def terms_by_hand(inputs, settings, log_z=None, log_prior=None, may=None):
    """Per row, {k: (residual, weight)}."""
    log_pf, log_pterm, log_reward, lengths = inputs
    s, rows = DEFAULTS | settings, []
    for row, n in enumerate(lengths.tolist()):
        states = [k for k in range(n + 1) if may is None or may[row, k]]
        u = {k: float(log_pf[row, :k].sum() + log_pterm[row, k] - log_reward[row, k]) for k in states}
        task = {k: float(log_reward[row, k]) for k in states}
        if log_prior is not None:
            task = {k: v - s["prior_scale"] * float(log_prior[row, k]) for k, v in task.items()}
        h = n if s["k_max"] is None else min(n, s["k_max"])
        taking = [k for k in states if s["k_min"] <= k <= h]
        total = sum(s["subtb_lambda"] ** (k - s["k_min"]) for k in taking)
        terms = {}
        for k in taking:
            future = [j for j in states if k <= j <= h]
            top = max(task[j] for j in future)
            mass = sum(math.exp(s["soft_beta"] * (task[j] - s["soft_rho"] * (j - k))) for j in future)
            target = s["max_share"] * top + (1 - s["max_share"]) * math.log(mass) / s["soft_beta"]
            corrected = abs(task[k] - s["missing_reward"]) <= s["tolerance"]
            if s["k_max"] is not None:
                corrected = corrected and k < s["k_max"] <= n
            alpha = s["gamma"] ** (h - k) if corrected else 0.0
            root = u[0] if 0 in states else -float(log_z[row])
            weight = s["subtb_lambda"] ** (k - s["k_min"]) / total if total else 0.0
            terms[k] = (u[k] - root + alpha * (task[k] - target), weight)
        rows.append(terms)
    return rows


def whole_by_hand(inputs):
    log_pf, log_pterm, log_reward, lengths = inputs
    return [
        float(log_pf[row, :n].sum() + log_pterm[row, n] - log_reward[row, n])
        for row, n in enumerate(lengths.tolist())
    ]


def estimate(whole, ids):
    mass = [sum(float(COUNTS[k]) for k in range(6) if ids[k] == i) for i in ids]
    sums = [sum(float(COUNTS[k]) * whole[k] for k in range(6) if ids[k] == i) for i in ids]
    return [-total / m if m else 0.0 for total, m in zip(sums, mass, strict=True)]


# Values and gradients.


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_definition(name, with_prior, some):
    inputs, log_prior = batch()
    settings, may = SETTINGS[name], terminable() if some else None
    log_prior = log_prior if with_prior else None
    whole = whole_by_hand(inputs)
    log_z = estimate(whole, GROUPS.tolist())
    rows = terms_by_hand(inputs, settings, log_z, log_prior, may)
    shared = settings | dict(log_prior=log_prior, terminable=may, counts=COUNTS, group_ids=GROUPS)
    hidden = (
        inputs
        if may is None
        else (inputs[0], *(x.masked_fill(~may, torch.nan) for x in inputs[1:3]), inputs[3])
    )
    residual, weight = F.rooted_prefix_terms(*hidden, **shared)
    for row, terms in enumerate(rows):
        for k in range(7):
            got = float(residual[row, k]), float(weight[row, k])
            close(f64(got), f64(terms.get(k, (0.0, 0.0))))
    for loss in ("squared", "huber"):
        nums = [
            float(residual_loss(f64(z + u), loss))
            + 0.4 * sum(w * float(residual_loss(f64(r), loss)) for r, w in terms.values())
            for z, u, terms in zip(log_z, whole, rows, strict=True)
        ]
        options = shared | dict(prefix_weight=0.4, loss=loss, reduction="none")
        close(F.rooted_prefix_tb_loss(*hidden, **options), f64(nums) * COUNTS)


def test_corrections_are_seen():
    """The settings of this file correct prefixes, each of them differently."""
    inputs, _ = batch()
    values = [F.rooted_prefix_tb_loss(*inputs, **settings).item() for settings in SETTINGS.values()]
    plain = [F.rooted_prefix_tb_loss(*inputs, **s | dict(gamma=0.0)).item() for s in SETTINGS.values()]
    assert len(set(values)) == len(values)
    assert all(abs(a - b) > 1e-3 for a, b in zip(values, plain, strict=True))


def test_without_prefixes_it_is_trajectory_balance():
    (log_pf, log_pterm, log_reward, lengths), _ = batch()
    rows = torch.arange(6)
    stopped = torch.nn.functional.pad(log_pf, (0, 1))
    stopped[rows, lengths] = log_pterm[rows, lengths]
    for options in ({}, dict(log_z=f64(0.7), weights=torch.rand(6).double()), dict(loss="shifted_cosh")):
        want = F.trajectory_balance_loss(stopped, log_reward[rows, lengths], lengths + 1, **options)
        close(
            F.rooted_prefix_tb_loss(log_pf, log_pterm, log_reward, lengths, prefix_weight=0.0, **options),
            want,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_gradients(some, loss):
    """gradcheck where nothing is stopped; the stop itself moves with the first term alone."""
    inputs, _ = batch()
    may = terminable() if some else None
    fixed = dict(terminable=may, loss=loss, prefix_weight=0.6, k_min=1, counts=COUNTS)
    log_pf, log_pterm, log_reward = (x.nan_to_num(0.0) for x in inputs[:3])
    leaves = [log_pf.requires_grad_(), torch.rand(6).double().requires_grad_()]

    def run(log_pf, log_z):
        return F.rooted_prefix_tb_loss(log_pf, log_pterm, log_reward, inputs[3], log_z=log_z, **fixed)

    assert torch.autograd.gradcheck(run, leaves)
    log_z, grads = leaves[1].detach(), []
    for prefix_weight in (0.6, 0.0):
        stop = log_pterm.clone().requires_grad_()
        value = F.rooted_prefix_tb_loss(
            log_pf, stop, log_reward, inputs[3], log_z=log_z, **fixed | dict(prefix_weight=prefix_weight)
        )
        grads.append(torch.autograd.grad(value, stop)[0])
    close(*grads)
    assert bool(((grads[0] != 0).sum(1) == (COUNTS > 0)).all()) or loss == "clamped"
    residual, _ = F.rooted_prefix_terms(log_pf, log_pterm, log_reward, inputs[3], terminable=may)
    assert residual.grad_fn is not None


def test_no_gradient_through_the_targets():
    """d loss / d log_reward is that of the residuals U alone."""
    inputs, _ = batch()
    log_reward = inputs[2].nan_to_num(0.0).requires_grad_()
    args = inputs[0], inputs[1], log_reward, inputs[3]
    residual, weight = F.rooted_prefix_terms(*args, k_min=1)
    (got,) = torch.autograd.grad((weight * residual.square()).sum(), log_reward)
    want = -2 * weight * residual.detach()
    want[:, 0] -= want.sum(1)
    close(got, want)


def test_counts_are_replicated_rows():
    inputs, log_prior = batch()
    copies = torch.repeat_interleave(torch.arange(6), COUNTS)
    weights = torch.rand(6).double()
    for normalization in ("batch", "trajectory", "group"):
        leaf = inputs[0].clone().requires_grad_()
        values, grads = [], []
        for rows, counts in ((slice(None), COUNTS), (copies, None)):
            value = F.rooted_prefix_tb_loss(
                leaf[rows],
                *(x[rows] for x in inputs[1:]),
                log_prior=log_prior[rows],
                weights=weights[rows],
                counts=counts,
                group_ids=GROUPS[rows],
                normalization=normalization,
            )
            values.append(value)
            grads.append(torch.autograd.grad(value, leaf)[0])
        close(*values)
        close(*grads)


@pytest.mark.parametrize("normalization", ["batch", "trajectory", "group"])
def test_a_row_that_was_cut_adds_nothing(normalization):
    """It has no log R of its own where it ends, and nothing of it is in the estimate of log Z."""
    inputs, _ = batch()
    may = terminable()
    may[2, LENGTHS[2]] = False
    kept = torch.tensor([0, 1, 3, 4, 5])
    leaf = inputs[0].clone().requires_grad_()
    values, grads = [], []
    for rows in (torch.arange(6), kept):
        options = dict(terminable=may[rows], group_ids=GROUPS[rows], normalization=normalization)
        value = F.rooted_prefix_tb_loss(leaf[rows], *(x[rows] for x in inputs[1:]), k_min=1, **options)
        values.append(value)
        grads.append(torch.autograd.grad(value, leaf)[0])
    close(*values)
    close(*grads)


def test_padding_does_not_matter():
    inputs, log_prior = batch()
    want = F.rooted_prefix_tb_loss(*inputs, log_prior=log_prior)
    wide = [torch.nn.functional.pad(x, (0, 3), value=torch.inf) for x in (*inputs[:3], log_prior)]
    wide = [x.requires_grad_() for x in wide]
    got = F.rooted_prefix_tb_loss(*wide[:3], inputs[3].int(), log_prior=wide[3])
    close(got, want)
    grads = torch.autograd.grad(got, wide[:3])
    column = torch.arange(10)
    assert bool((grads[0][column[:-1] >= inputs[3][:, None]] == 0).all())
    assert all(bool((g[column > inputs[3][:, None]] == 0).all()) for g in grads[1:])
    assert torch.equal(F.rooted_prefix_tb_loss(*inputs, log_prior=log_prior), want)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no_rows", "no_width"])
def test_odd_shapes(shape):
    n, width = shape
    log_pf, states = torch.zeros(n, width, requires_grad=True), torch.ones(n, width + 1)
    lengths = torch.zeros(n, dtype=torch.int64)
    value = F.rooted_prefix_tb_loss(log_pf, -states, states, lengths)
    assert value.item() == 0.0 and value.dtype == torch.float32
    value = F.rooted_prefix_tb_loss(log_pf, -states, states, lengths, log_z=torch.tensor(5.0))
    assert value.item() == (9.0 if n else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    inputs, _ = batch(dtype)
    leaf = inputs[0].clone().requires_grad_()
    value = F.rooted_prefix_tb_loss(leaf, *inputs[1:])
    truth = F.rooted_prefix_tb_loss(*(x.double() for x in inputs[:3]), inputs[3])
    assert value.dtype == torch.float32 and abs(value - truth) <= 1e-6 * max(1.0, truth)
    value.backward()
    assert leaf.grad.dtype == dtype


def test_compiles():
    """Trajectory balance and both losses over prefixes in one graph."""
    inputs, _ = batch(torch.float32)
    options = dict(terminable=terminable(), group_ids=GROUPS, normalization="group")

    def losses(log_pf):
        args = log_pf, *inputs[1:]
        whole = F.vargrad_loss(log_pf, inputs[1][:, 0], inputs[3], group_ids=GROUPS)
        parts = F.interpolated_subtb_loss(*args, segment=2, **options)
        return whole + parts + F.rooted_prefix_tb_loss(*args, **options)

    leaf = inputs[0].clone().requires_grad_()
    value, compiled = losses(leaf), torch.compile(losses, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(compiled, value)
    assert torch.equal(torch.autograd.grad(compiled, leaf)[0], torch.autograd.grad(value, leaf)[0])


# Refusals.


def test_refuses_settings():
    inputs, log_prior = batch()
    for options, kind, message in (
        (dict(prefix_weight=-0.1), ValueError, "prefix_weight must be >= 0, got -0.1; 0 leaves trajectory"),
        (dict(k_min=0), ValueError, "k_min must be >= 1, got 0"),
        (dict(k_max=1), ValueError, "k_max must be None or >= k_min = 2, got 1"),
        (dict(subtb_lambda=1.2), ValueError, r"subtb_lambda must be in \[0, 1\], got 1.2"),
        (dict(gamma=1.5), ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        (dict(max_share=2), ValueError, r"max_share must be in \[0, 1\], got 2"),
        (dict(soft_beta=0.0), ValueError, "soft_beta must be > 0, got 0.0"),
        (dict(soft_rho=-1.0), ValueError, "soft_rho must be >= 0, got -1.0"),
        (dict(tolerance=-1.0), ValueError, "tolerance must be >= 0, got -1.0"),
        (dict(log_prior=log_prior, prior_scale=-1.0), ValueError, "prior_scale must be >= 0, got -1.0"),
        (dict(log_prior=log_prior[:, 1:]), ValueError, r"log_prior must be \(6, 7\), got \(6, 6\)"),
        (dict(prior_scale=0.5), ValueError, "prior_scale must be 0 or 1 without log_prior, got 0.5"),
        (dict(terminable=COUNTS), TypeError, "terminable must be bool"),
        (dict(log_z=f64(0.0), group_ids=GROUPS), ValueError, "group_ids must be None"),
        (dict(loss="huber", residual_limit=1.0), ValueError, "residual_limit must be None"),
    ):
        with pytest.raises(kind, match="rooted_prefix_tb_loss: " + message):
            F.rooted_prefix_tb_loss(*inputs, **options)
    with pytest.raises(ValueError, match="rooted_prefix_terms: k_min must be >= 1, got -1"):
        F.rooted_prefix_terms(*inputs, k_min=-1)
    for function in (F.rooted_prefix_tb_loss, F.rooted_prefix_terms):
        with pytest.raises(ValueError, match=r"lengths\[2\] must be in \[0, T\] = \[0, 6\], got 7"):
            function(*inputs[:3], inputs[3] + 1)
    inputs[2][0, 1] = math.nan
    with pytest.raises(RuntimeError, match=r"log_reward\[0, 1\] must be finite, got nan"):
        F.rooted_prefix_tb_loss(*inputs, debug=True)
