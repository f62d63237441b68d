"""Trajectory balance and its family: the equations row by row, fixed points, counts, groups, refusals."""

import pytest
import torch
from loss_cases import close, f64, padded_rows

import fastgfn.functional as F
from fastgfn.ops.residual import LOSSES
from fastgfn.reference.residual import residual_loss
from fastgfn.testing import FLOORS

GROUPS = torch.tensor([7, 7, -2, 7, -2, 30])
COUNTS = torch.tensor([2, 1, 3, 1, 0, 1])
VARIANTS = ["tb", "tb_rows", "vargrad", "vargrad_groups", "rtb", "length", "backward"]


def batch(dtype=torch.float64, lengths=(3, 1, 5, 0, 5, 2)):
    """(log_pf, log_reward, lengths) and log_pb, log_prior: NaN on the padding; row 3 holds nothing."""
    log_pf, states, lengths = padded_rows(lengths, dtype=dtype)
    log_pb, log_prior = states[0, :, 1:], states[1, :, 1:]
    log_reward = (-5 * torch.rand(len(lengths))).to(dtype).masked_fill(lengths == 0, torch.nan)
    return (log_pf, log_reward, lengths), log_pb, log_prior


def variant(name, log_pb, log_prior):
    """(options, grouped): of trajectory_balance_loss."""
    n = len(log_pb)
    log_z = torch.linspace(0.5, 2.0, n, dtype=log_pb.dtype)
    return {
        "tb": dict(log_z=log_z[2].clone()),
        "tb_rows": dict(log_z=log_z),
        "vargrad": {},
        "vargrad_groups": dict(group_ids=GROUPS),
        "rtb": dict(log_z=log_z[1].clone(), log_prior=log_prior, beta=0.7),
        "length": dict(log_z=log_z, log_prior=log_prior, beta=1.5, length_normalize=True),
        "backward": dict(log_pb=log_pb),
    }[name]


def by_hand(log_pf, log_reward, lengths, options, counts):
    """(N,) residuals in Python floats, one row at a time; 0 for the rows that hold nothing."""
    beta, deltas = options.get("beta", 1.0), []
    for row, n in enumerate(lengths.tolist()):
        total = sum(float(log_pf[row, t]) for t in range(n))
        for name in ("log_pb", "log_prior"):
            if name in options:
                total -= sum(float(options[name][row, t]) for t in range(n))
        if options.get("length_normalize"):
            total /= max(1, n)
        deltas.append(total - beta * float(log_reward[row]) if n else 0.0)
    log_z, ids = options.get("log_z"), options.get("group_ids", torch.zeros(len(deltas))).tolist()
    residuals = []
    for row, n in enumerate(lengths.tolist()):
        if log_z is None:
            peers = [k for k in range(len(ids)) if ids[k] == ids[row] and lengths[k] > 0]
            mass = sum(float(counts[k]) for k in peers)
            z = -sum(float(counts[k]) * deltas[k] for k in peers) / mass if mass else 0.0
        else:
            z = float(log_z) if log_z.dim() == 0 else float(log_z[row])
        residuals.append(z + deltas[row] if n else 0.0)
    return f64(residuals)


# Values and gradients.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", VARIANTS)
def test_equation(name, loss):
    inputs, log_pb, log_prior = batch()
    options = variant(name, log_pb, log_prior)
    residual = by_hand(*inputs, options, torch.ones(6))
    close(F.trajectory_balance_residual(*inputs, **options), residual)
    value = residual_loss(residual, loss)
    close(F.trajectory_balance_loss(*inputs, **options, loss=loss, reduction="none"), value)
    close(F.trajectory_balance_loss(*inputs, **options, loss=loss), value.sum() / 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_reductions(name):
    inputs, log_pb, log_prior = batch()
    options = variant(name, log_pb, log_prior)
    weights = torch.rand(6).double()
    num = by_hand(*inputs, options, COUNTS).square() * weights
    mass = (COUNTS * (inputs[2] > 0)).double()
    spread = torch.stack([mass[GROUPS == g].sum() for g in GROUPS.tolist()])
    pooled = [(num * mass)[GROUPS == g].sum() / mass[GROUPS == g].sum() for g in (7, -2, 30)]
    want = {
        "batch": ((num * mass).sum() / mass.sum(), (num * mass).sum(), num * mass, mass),
        "trajectory": ((num * mass).sum() / mass.sum(), (num * mass).sum(), num * (mass > -1), mass),
    }
    if name.startswith("vargrad_groups"):
        want["group"] = (sum(pooled) / 3, sum(pooled), num * mass / spread, mass / spread)
    for normalization, (mean, total, rows, weight) in want.items():
        given = options | dict(normalization=normalization, weights=weights, counts=COUNTS)
        close(F.trajectory_balance_loss(*inputs, **given), mean)
        close(F.trajectory_balance_loss(*inputs, **given, reduction="none"), rows)
        got, got_weight = F.trajectory_balance_loss(*inputs, **given, reduction="sum", return_weight=True)
        close(got, total)
        close(got_weight, weight)
        close(got / got_weight.sum(), mean)


def test_group_means_with_a_learned_value():
    inputs, _, _ = batch()
    log_z = torch.tensor(1.5, dtype=torch.float64)
    num = by_hand(*inputs, dict(log_z=log_z), torch.ones(6)).square()
    pooled = [num[0] / 2 + num[1] / 2, num[2] / 2 + num[4] / 2, num[5]]
    options = dict(log_z=log_z, normalization="group", group_ids=GROUPS)
    close(F.trajectory_balance_loss(*inputs, **options), sum(pooled) / 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name, loss):
    """Without log_z only the square has the gradient of its own value: the mean is detached."""
    inputs, log_pb, log_prior = batch()
    options = variant(name, log_pb, log_prior)
    if "log_z" not in options and loss not in ("squared", "half_squared"):
        inputs_grad = torch.autograd.grad(
            F.trajectory_balance_loss(inputs[0].requires_grad_(), *inputs[1:], **options, loss=loss),
            inputs[0],
        )[0]
        residual = F.trajectory_balance_residual(*inputs, **options)
        plain = {k: v for k, v in options.items() if k != "group_ids"}
        frozen = (residual - F.trajectory_balance_residual(*inputs, **plain, log_z=f64(0.0))).detach()
        fixed = F.trajectory_balance_loss(*inputs, **plain, log_z=frozen, loss=loss)
        close(inputs_grad, torch.autograd.grad(fixed, inputs[0])[0])
        return
    tensors = {k: v for k, v in options.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (inputs[0], inputs[1], *tensors.values())]

    def run(log_pf, log_reward, *given):
        changed = options | dict(zip(tensors, given, strict=True))
        return F.trajectory_balance_loss(log_pf, log_reward, inputs[2], **changed, loss=loss, counts=COUNTS)

    assert torch.autograd.gradcheck(run, leaves)


def test_named_forms():
    inputs, log_pb, log_prior = batch()
    weights = torch.rand(6).double()
    shared = dict(weights=weights, counts=COUNTS, reduction="none")
    for normalization in ("batch", "group"):
        options = shared | dict(group_ids=GROUPS, normalization=normalization)
        close(F.vargrad_loss(*inputs, **options), F.trajectory_balance_loss(*inputs, **options))
    log_z = f64(0.4)
    rtb = F.relative_trajectory_balance_loss(
        inputs[0], log_prior, *inputs[1:], beta=0.6, log_z=log_z, half=True, **shared
    )
    want = F.trajectory_balance_loss(*inputs, log_prior=log_prior, beta=0.6, log_z=log_z, **shared)
    close(rtb, 0.5 * want)
    close(F.vargrad_loss(*inputs, log_pb=log_pb), F.trajectory_balance_loss(*inputs, log_pb=log_pb))


def test_vargrad_is_the_variance_with_its_gradient():
    inputs, _, _ = batch(lengths=(3, 1, 5, 2, 4, 2))
    leaf = inputs[0].requires_grad_()
    got = torch.autograd.grad(F.vargrad_loss(leaf, *inputs[1:]), leaf)[0]
    filled = torch.where(leaf.isnan(), 0, leaf)
    variance = (filled.sum(1) - inputs[1]).var(unbiased=False)
    close(F.vargrad_loss(*inputs), variance)
    close(got, torch.autograd.grad(variance, leaf)[0])


def test_one_full_span_of_subtb_is_trajectory_balance():
    """The window from s_0 to the sink, with F(s_0) = e^log_z and F(sink) = R."""
    inputs, _, _ = batch(lengths=(1, 1, 1, 1, 1, 1))
    log_pf, log_reward, lengths = inputs
    log_z = torch.rand(6).double()
    flow = torch.full((6, 6), torch.nan, dtype=torch.float64)
    flow[:, 0], flow[:, 1] = log_z, log_reward
    close(F.subtb_loss(log_pf, flow, lengths), F.trajectory_balance_loss(*inputs, log_z=log_z))
    # Longer rows: the residual of that window is a difference of two potentials.
    inputs, log_pb, _ = batch(lengths=(3, 1, 5, 2, 5, 4))
    log_pf, log_reward, lengths = inputs
    flow = torch.randn(6, 6).double()
    rows = torch.arange(6)
    flow[rows, 0], flow[rows, lengths] = log_z, log_reward
    potential = F.subtb_potential(log_pf, flow, lengths, log_pb=log_pb)
    span = potential[rows, 0] - potential[rows, lengths]
    close(span, F.trajectory_balance_residual(*inputs, log_z=log_z, log_pb=log_pb))


# Counts, padding, empty batches, dtypes.


@pytest.mark.parametrize("normalization", ["batch", "trajectory", "group"])
@pytest.mark.parametrize("name", ["tb_rows", "vargrad_groups", "rtb"])
def test_counts_are_replicated_rows(name, normalization):
    inputs, log_pb, log_prior = batch()
    options = variant(name, log_pb, log_prior) | dict(weights=torch.rand(6).double(), group_ids=GROUPS)
    if name != "vargrad_groups" and normalization != "group":
        del options["group_ids"]
    copies = torch.repeat_interleave(torch.arange(6), COUNTS)
    leaf = inputs[0].clone().requires_grad_()
    values, grads = [], []
    for rows, counts in ((slice(None), COUNTS), (copies, None)):
        given = {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in options.items()}
        value = F.trajectory_balance_loss(
            leaf[rows], *(x[rows] for x in inputs[1:]), **given, counts=counts, normalization=normalization
        )
        values.append(value)
        grads.append(torch.autograd.grad(value, leaf)[0])
    close(*values)
    close(*grads)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_does_not_matter(name):
    inputs, log_pb, log_prior = batch()
    options = variant(name, log_pb, log_prior)
    want = F.trajectory_balance_loss(*inputs, **options)
    pad = torch.nn.functional.pad
    wide = {k: pad(v, (0, 4), value=torch.inf) for k, v in options.items() if k in ("log_pb", "log_prior")}
    leaf, reward = (
        pad(inputs[0], (0, 4), value=-torch.inf).requires_grad_(),
        inputs[1].clone().requires_grad_(),
    )
    got = F.trajectory_balance_loss(leaf, reward, inputs[2].int(), **(options | wide))
    close(got, want)
    grad, grad_reward = torch.autograd.grad(got, (leaf, reward))
    padding = torch.arange(9) >= inputs[2][:, None]
    assert bool((grad[padding] == 0).all()) and grad_reward[3] == 0
    alone = torch.zeros(6, dtype=torch.bool) if name != "vargrad_groups" else GROUPS == 30
    assert bool(((grad == 0).all(1) == (alone | (inputs[2] == 0))).all())
    strided = F.trajectory_balance_loss(inputs[0].T.contiguous().T, *inputs[1:], **options)
    assert torch.equal(strided, want)


@pytest.mark.parametrize("normalization", ["batch", "trajectory", "group"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (2, 0)], ids=["no_rows", "length_0", "no_width"])
def test_empty_is_zero(shape, normalization):
    log_pf = torch.full(shape, torch.nan, requires_grad=True)
    log_reward = torch.full(shape[:1], torch.nan, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    group_ids = lengths if normalization == "group" else None
    for log_z in (None, torch.zeros(()), torch.zeros(shape[0])):
        value = F.trajectory_balance_loss(
            log_pf, log_reward, lengths, log_z=log_z, normalization=normalization, group_ids=group_ids
        )
        assert value.item() == 0.0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, (log_pf, log_reward)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    inputs, _, log_prior = batch(dtype)
    leaf = inputs[0].clone().requires_grad_()
    value = F.trajectory_balance_loss(leaf, *inputs[1:], log_prior=log_prior, beta=0.5)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = [x.double() for x in (*inputs[:2], log_prior)]
    truth = F.trajectory_balance_loss(*wide[:2], inputs[2], log_prior=wide[2], beta=0.5)
    assert abs(value.item() - truth.item()) <= FLOORS[torch.float32] * max(1.0, truth.item())
    value.backward()
    assert leaf.grad.dtype == dtype
    assert F.trajectory_balance_residual(*inputs).dtype == value.dtype
    assert F.trajectory_balance_loss(*inputs, log_z=f64(0.0)).dtype == torch.float64


def test_repeats_bits():
    inputs, _, log_prior = batch(torch.float32)

    def loss_only(log_pf):
        options = dict(log_prior=log_prior, group_ids=GROUPS, normalization="group")
        return F.trajectory_balance_loss(log_pf, *inputs[1:], **options)

    leaf = inputs[0].clone().requires_grad_()
    first, second = loss_only(leaf), loss_only(leaf)
    grads = [torch.autograd.grad(x, leaf)[0] for x in (first, second)]
    assert torch.equal(first, second) and torch.equal(*grads)


# Refusals.


def test_refuses_inputs():
    (log_pf, log_reward, lengths), log_pb, log_prior = batch()
    z = f64(1.0)
    for options, kind, message in (
        (
            dict(log_reward=log_pf),
            ValueError,
            r"trajectory_balance_loss: log_reward must be \(6,\), got \(6, 5\)",
        ),
        (dict(log_pb=log_pf[:, 1:]), ValueError, r"log_pb must be \(6, 5\), got \(6, 4\)"),
        (dict(log_prior=lengths), TypeError, "log_prior must be floating point"),
        (dict(log_z=log_pf), ValueError, r"log_z must be \(\) or \(6,\), got \(6, 5\); pass one value"),
        (dict(log_z=1.0), ValueError, "log_z must be a tensor or None, got 1.0"),
        (dict(log_z=lengths), TypeError, "log_z must be floating point"),
        (dict(lengths=lengths + 1), ValueError, r"lengths\[2\] must be in \[0, T\] = \[0, 5\], got 6"),
        (
            dict(beta=0.5),
            ValueError,
            "beta must be 1 without log_prior, got 0.5; pass log_prior or length_norm",
        ),
        (dict(beta=0.0, log_prior=log_prior), ValueError, "beta must be > 0, got 0.0"),
        (dict(log_z=z, group_ids=GROUPS), ValueError, "group_ids must be None, got a tensor; .* log_z None"),
        (dict(normalization="group"), ValueError, "group_ids must be given, got None"),
        (dict(half=True, loss="huber"), ValueError, "loss must be 'squared' beside half, got 'huber'"),
        (dict(loss="huber", residual_limit=3.0), ValueError, "residual_limit must be None, got 3.0"),
        (dict(loss="clamped", residual_limit=0.0), ValueError, "residual_limit must be > 0, got 0.0"),
        (dict(loss="l2"), ValueError, "loss must be one of squared, .*, clamped, got 'l2'"),
        (dict(weights=lengths), TypeError, "weights must be floating point"),
        (dict(counts=COUNTS[:2]), ValueError, r"counts must be \(6,\), got \(2,\)"),
    ):
        given = dict(log_pf=log_pf, log_reward=log_reward, lengths=lengths) | options
        with pytest.raises(kind, match=message):
            F.trajectory_balance_loss(**given)
    with pytest.raises(ValueError, match="vargrad_loss: normalization must be one of"):
        F.vargrad_loss(log_pf, log_reward, lengths, normalization="prompt")
    with pytest.raises(
        ValueError, match="relative_trajectory_balance_loss: loss must be 'squared' beside half"
    ):
        F.relative_trajectory_balance_loss(log_pf, log_prior, log_reward, lengths, half=True, loss="linex")


def test_debug_names_the_value():
    (log_pf, log_reward, lengths), _, log_prior = batch()
    log_reward[4] = -torch.inf
    message = r"trajectory_balance_loss: log_reward\[4\] must be finite, got -inf"
    with pytest.raises(RuntimeError, match=message):
        F.trajectory_balance_loss(log_pf, log_reward, lengths, debug=True)
    log_reward[4], log_prior[2, 1] = 0.0, torch.nan
    with pytest.raises(RuntimeError, match=r"residual: log_prior\[2, 1\] must be finite, got nan"):
        F.trajectory_balance_residual(log_pf, log_reward, lengths, log_prior=log_prior, debug=True)
    with pytest.raises(RuntimeError, match="log_z must be finite, got inf"):
        F.trajectory_balance_loss(log_pf, log_reward, lengths, log_z=f64(torch.inf), debug=True)
