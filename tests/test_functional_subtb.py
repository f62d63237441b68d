"""The padded public losses: semantics of the reductions, the conventions on padding, and the refusals."""

import pytest
import torch

from fastgfn.functional import subtb as F
from fastgfn.functional._rows import LOSSES, NORMALIZATIONS
from fastgfn.reference.residual import residual_loss
from fastgfn.testing import FLOORS

LAMBDAS = [0.0, 0.5, 0.9, 1.0]


def batch(lengths=(3, 0, 5, 1, 5, 2), width=5, dtype=torch.float64):
    """(log_pf, log_pterm, log_reward, lengths), NaN on the padding."""
    lengths = torch.tensor(lengths)
    column = torch.arange(width + 1)
    log_pf = -torch.rand(len(lengths), width).to(dtype)
    states = -3 * torch.rand(2, len(lengths), width + 1).to(dtype)
    log_pf[column[:-1] >= lengths[:, None]] = torch.nan
    states[:, column > lengths[:, None]] = torch.nan
    return log_pf, *states, lengths


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand(log_pf, log_pterm, log_reward, lengths, subtb_lambda=1.0, loss="squared", include_sink=False):
    """Per row, one window at a time: (numerators, denominators)."""
    nums, dens = [], []
    for pf, stop, reward, n in zip(log_pf, log_pterm, log_reward, lengths.tolist(), strict=True):
        flow = [float(reward[t] - stop[t]) for t in range(n + 1)]
        steps = [float(pf[t]) for t in range(n)]
        if include_sink:
            flow.append(flow[-1])
            steps.append(0.0)
        num = den = 0.0
        for i in range(len(flow)):
            for j in range(i + 1, len(flow)):
                residual = flow[i] + sum(steps[i:j]) - flow[j]
                weight = subtb_lambda ** (j - i - 1)
                num += weight * float(residual_loss(f64(residual), loss))
                den += weight
        nums.append(num)
        dens.append(den)
    return f64(nums), f64(dens)


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=1e-10, atol=1e-12)


# Values and gradients.


@pytest.mark.parametrize("include_sink", [False, True])
@pytest.mark.parametrize("subtb_lambda", LAMBDAS)
def test_reductions(subtb_lambda, include_sink):
    inputs = batch()
    num, den = by_hand(*inputs, subtb_lambda, include_sink=include_sink)
    weights, counts = torch.rand(6).double(), torch.tensor([1, 2, 0, 3, 1, 1])
    group_ids = torch.tensor([7, 7, -2, 7, -2, 30])
    row_num, row_den = weights * counts * num, counts * den
    ratio = torch.where(den > 0, num / den.clamp(min=1e-9), 0) * weights
    groups = [group_ids == g for g in (7, -2, 30)]
    pooled = torch.stack([row_num[g].sum() / row_den[g].sum() for g in groups])
    present = ((den > 0) * counts).sum()
    spread = torch.stack([row_den[group_ids == g].sum() for g in group_ids.tolist()])
    want = {
        "batch": (row_num.sum() / row_den.sum(), row_num.sum(), row_num, row_den),
        "trajectory": ((ratio * counts).sum() / present, (ratio * counts).sum(), ratio, (den > 0) * counts),
        "group": (pooled.mean(), pooled.sum(), row_num / spread, row_den / spread),
    }
    for normalization, (mean, total, rows, weight) in want.items():
        options = dict(subtb_lambda=subtb_lambda, normalization=normalization, include_sink=include_sink)
        options |= dict(weights=weights, counts=counts)
        options |= dict(group_ids=group_ids) if normalization == "group" else {}
        close(F.modified_subtb_loss(*inputs, **options), mean)
        close(F.modified_subtb_loss(*inputs, **options, reduction="none"), rows)
        got, got_weight = F.modified_subtb_loss(*inputs, **options, reduction="sum", return_weight=True)
        close(got, total)
        close(got_weight, weight)
        close(got / got_weight.sum(), mean)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalization", ["batch", "trajectory"])
def test_losses_and_gradients(loss, normalization):
    log_pf, log_pterm, log_reward, lengths = batch()
    clean = [x.nan_to_num(0.0).requires_grad_() for x in (log_pf, log_pterm, log_reward)]
    scale, name = (0.5, "squared") if loss == "half_squared" else (1.0, loss)
    num, den = by_hand(log_pf, log_pterm, log_reward, lengths, 0.9, name)
    options = dict(subtb_lambda=0.9, loss=loss, normalization=normalization)
    value = F.modified_subtb_loss(*clean, lengths, **options)
    batch_mean = num.sum() / den.sum()
    close(value, scale * (batch_mean if normalization == "batch" else (num / den)[den > 0].mean()))
    torch.autograd.gradcheck(lambda *x: F.modified_subtb_loss(*x, lengths, **options), clean)


def test_residual_limit():
    inputs = batch()
    clean = [x.nan_to_num(0.0).requires_grad_() for x in inputs[:3]]
    values = []
    for limit in (0.4, 2.0):
        want = 0.0
        for pf, stop, reward, n in zip(*inputs, strict=True):
            u = [float(pf[:k].sum() + stop[k] - reward[k]) for k in range(n + 1)]
            want += sum(min(abs(u[j] - u[i]), limit) ** 2 for i in range(n) for j in range(i + 1, n + 1))
        options = dict(loss="clamped", residual_limit=limit, reduction="sum")
        values.append(F.modified_subtb_loss(*clean, inputs[3], **options))
        close(values[-1], want)
        torch.autograd.gradcheck(
            lambda *x, given=options: F.modified_subtb_loss(*x, inputs[3], **given), clean
        )
    assert values[0] < 0.5 * values[-1]


def test_log_pb_and_log_flow():
    log_pf, log_pterm, log_reward, lengths = batch()
    log_pb = torch.randn_like(log_pf).masked_fill(log_pf.isnan(), torch.nan)
    flow = log_reward - log_pterm
    close(
        F.subtb_loss(log_pf + log_pb, flow, lengths, log_pb=log_pb, subtb_lambda=0.9),
        F.modified_subtb_loss(log_pf, log_pterm, log_reward, lengths, subtb_lambda=0.9),
    )
    leaf = log_pb.clone().requires_grad_()
    F.subtb_loss(log_pf, flow, lengths, log_pb=leaf).backward()
    assert bool((leaf.grad[log_pf.isnan()] == 0).all()) and float(leaf.grad.abs().sum()) > 0


def test_lambda_one_is_a_variance():
    """With lambda = 1 the pairs of n + 1 states sum to (n + 1)^2 times the variance of the potential."""
    log_pf, log_pterm, log_reward, _ = batch((5, 5), 5)
    lengths = torch.tensor([5, 5])
    potential = F.subtb_potential(log_pf, log_reward - log_pterm, lengths)
    want = 36 * potential.var(1, unbiased=False)
    close(F.subtb_loss(log_pf, log_reward - log_pterm, lengths, reduction="none"), want)


def test_potential_gives_residuals():
    log_pf, log_pterm, log_reward, lengths = batch()
    flow = (log_reward - log_pterm).requires_grad_()
    pf = log_pf.clone().requires_grad_()
    b = F.subtb_potential(pf, flow, lengths)
    close(b[2, 1] - b[2, 4], flow[2, 1] + pf[2, 1:4].sum() - flow[2, 4])
    assert bool((b[flow.isnan()] == 0).all())
    b.square().sum().backward()
    assert bool((pf.grad[log_pf.isnan()] == 0).all()) and bool((flow.grad[flow.isnan()] == 0).all())


def test_termination_log_prob():
    log_pf, log_pterm, _, lengths = batch()
    pf, stop = log_pf.clone().requires_grad_(), log_pterm.clone().requires_grad_()
    got = F.termination_log_prob(pf, stop, lengths)
    close(got, [float(log_pf[n, :k].sum() + log_pterm[n, k]) for n, k in enumerate(lengths.tolist())])
    got.sum().backward()
    column = torch.arange(6)
    assert torch.equal(pf.grad, (column[:-1] < lengths[:, None]).double())
    assert torch.equal(stop.grad, (column == lengths[:, None]).double())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_counts_are_replicated_rows(normalization):
    inputs = batch()
    counts, group_ids = torch.tensor([2, 1, 3, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    copies = torch.repeat_interleave(torch.arange(6), counts)
    weights = torch.rand(6).double()
    grouped = normalization == "group"
    options = dict(subtb_lambda=0.9, normalization=normalization)
    leaf = inputs[0].clone().requires_grad_()
    values, grads = [], []
    for rows, c in ((slice(None), counts), (copies, None)):
        value = F.modified_subtb_loss(
            leaf[rows],
            *(x[rows] for x in inputs[1:]),
            weights=weights[rows],
            counts=c,
            group_ids=group_ids[rows] if grouped else None,
            **options,
        )
        values.append(value)
        grads.append(torch.autograd.grad(value, leaf)[0])
    close(*values)
    close(*grads)


def test_padding_does_not_matter():
    log_pf, log_pterm, log_reward, lengths = batch()
    value = F.modified_subtb_loss(log_pf, log_pterm, log_reward, lengths, subtb_lambda=0.9)
    wide = [torch.nn.functional.pad(x, (0, 4), value=torch.inf) for x in (log_pf, log_pterm, log_reward)]
    wide = [x.requires_grad_() for x in wide]
    for loss in ("squared", "linex"):
        for include_sink in (False, True):
            options = dict(subtb_lambda=0.9, loss=loss, include_sink=include_sink)
            got = F.modified_subtb_loss(*wide, lengths, **options)
            close(got, F.modified_subtb_loss(log_pf, log_pterm, log_reward, lengths, **options).item())
            grads = torch.autograd.grad(got, wide)
            column = torch.arange(10)
            assert bool((grads[0][column[:-1] >= lengths[:, None]] == 0).all())
            assert all(bool((g[column > lengths[:, None]] == 0).all()) for g in grads[1:])
    transposed = F.modified_subtb_loss(
        log_pf.T.contiguous().T, log_pterm, log_reward.T.contiguous().T, lengths.int(), subtb_lambda=0.9
    )
    assert torch.equal(transposed, value)


# Odd shapes.


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (2, 0)], ids=["no_rows", "length_0", "no_width"])
def test_empty_is_zero(shape, loss, normalization):
    n, width = shape
    log_pf = torch.full((n, width), torch.nan, requires_grad=True)
    log_flow = torch.zeros(n, width + 1, requires_grad=True)
    lengths = torch.zeros(n, dtype=torch.int64)
    group_ids = lengths if normalization == "group" else None
    value = F.subtb_loss(
        log_pf, log_flow, lengths, loss=loss, normalization=normalization, group_ids=group_ids
    )
    assert value.item() == 0.0
    grads = torch.autograd.grad(value, (log_pf, log_flow))
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    inputs = batch(dtype=dtype)
    leaf = inputs[0].clone().requires_grad_()
    value = F.modified_subtb_loss(leaf, *inputs[1:], subtb_lambda=0.9)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = F.modified_subtb_loss(*(x.double() for x in inputs[:3]), inputs[3], subtb_lambda=0.9)
    assert abs(value.item() - truth.item()) <= FLOORS[torch.float32] * max(1.0, truth.item())
    value.backward()
    assert leaf.grad.dtype == dtype
    assert F.subtb_potential(*inputs[:2], inputs[3]).dtype == value.dtype
    assert F.termination_log_prob(*inputs[:2], inputs[3]).dtype == value.dtype


# Repeatability and compilation.


def test_repeats_bits_and_compiles():
    inputs = batch(dtype=torch.float32)
    group_ids = torch.tensor([0, 1, 1, 0, 2, 2])

    def step(log_pf):
        value = F.modified_subtb_loss(
            log_pf, *inputs[1:], subtb_lambda=0.9, normalization="group", group_ids=group_ids
        )
        return value, *torch.autograd.grad(value, log_pf)

    leaf = inputs[0].clone().requires_grad_()
    first = step(leaf)
    assert all(torch.equal(a, b) for a, b in zip(first, step(leaf), strict=True))

    def loss_only(log_pf):
        return F.modified_subtb_loss(
            log_pf, *inputs[1:], subtb_lambda=0.9, normalization="group", group_ids=group_ids
        )

    compiled = torch.compile(loss_only, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(compiled, first[0])
    assert torch.equal(torch.autograd.grad(compiled, leaf)[0], first[1])


# Refusals.


def test_refuses_shapes_and_types():
    log_pf, log_pterm, log_reward, lengths = (x.nan_to_num(0.0) for x in batch())
    for args, kind, message in (
        ((log_pf, log_pf, lengths), ValueError, r"subtb_loss: log_flow must be \(6, 6\), got \(6, 5\)"),
        ((log_pf[0], log_pterm, lengths), ValueError, r"log_pf must be \(N, T\)"),
        ((log_pf, log_pterm, lengths[:2]), ValueError, r"lengths must be \(6,\), got \(2,\)"),
        ((log_pf, log_pterm, lengths.double()), TypeError, "lengths must be int32 or int64"),
        ((log_pf.long(), log_pterm, lengths), TypeError, "log_pf must be floating point"),
        ((log_pf, log_pterm.long(), lengths), TypeError, "log_flow must be floating point"),
        ((log_pf, log_pterm, lengths + 1), ValueError, r"lengths\[2\] must be in \[0, T\] = \[0, 5\], got 6"),
        ((log_pf, log_pterm.to("meta"), lengths), ValueError, "log_flow must be on cpu, got meta"),
    ):
        with pytest.raises(kind, match=message):
            F.subtb_loss(*args)
    with pytest.raises(ValueError, match=r"modified_subtb_loss: log_reward must be \(6, 6\)"):
        F.modified_subtb_loss(log_pf, log_pterm, log_pf, lengths)
    with pytest.raises(ValueError, match=r"termination_log_prob: log_pterm must be \(6, 6\)"):
        F.termination_log_prob(log_pf, log_pf, lengths)
    with pytest.raises(ValueError, match=r"subtb_potential: log_pb must be \(6, 5\)"):
        F.subtb_potential(log_pf, log_reward, lengths, log_pb=log_reward)


def test_refuses_options():
    log_pf, log_pterm, _, lengths = (x.nan_to_num(0.0) for x in batch())
    ids = torch.arange(6)
    for options, kind, message in (
        (dict(subtb_lambda=1.1), ValueError, r"subtb_lambda must be in \[0, 1\], got 1.1"),
        (dict(normalization="prompt"), ValueError, "normalization must be one of batch, trajectory, group"),
        (dict(reduction="max"), ValueError, "reduction must be one of mean, sum, none"),
        (dict(loss="l1"), ValueError, "loss must be one of squared, half_squared, huber"),
        (dict(normalization="group"), ValueError, "group_ids must be given, got None"),
        (dict(group_ids=ids), ValueError, "group_ids must be None, got a tensor"),
        (dict(group_ids=ids * 1.0, normalization="group"), TypeError, "group_ids must be int32 or int64"),
        (dict(weights=ids), TypeError, "weights must be floating point"),
        (dict(weights=torch.ones(2)), ValueError, r"weights must be \(6,\), got \(2,\)"),
        (dict(counts=torch.ones(2)), ValueError, r"counts must be \(6,\), got \(2,\)"),
        (dict(counts=ids.to("meta")), ValueError, "counts must be on cpu, got meta"),
    ):
        with pytest.raises(kind, match=message):
            F.subtb_loss(log_pf, log_pterm, lengths, **options)


def test_debug_names_the_value(monkeypatch):
    log_pf, log_pterm, log_reward, lengths = batch()
    log_reward[2, 4] = -torch.inf
    args = (log_pf, log_pterm, log_reward, lengths)
    assert F.modified_subtb_loss(*args).isinf() or F.modified_subtb_loss(*args).isnan()
    message = r"modified_subtb_loss: log_reward\[2, 4\] must be finite, got -inf"
    with pytest.raises(RuntimeError, match=message):
        F.modified_subtb_loss(*args, debug=True)
    monkeypatch.setenv("FASTGFN_DEBUG", "1")
    with pytest.raises(RuntimeError, match=message):
        F.modified_subtb_loss(*args)
    with pytest.raises(RuntimeError, match=r"lengths\[0\] must be in \[0, T\] = \[0, 5\], got -1"):
        F.termination_log_prob(log_pf, log_pterm, lengths - 4)
