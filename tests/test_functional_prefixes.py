"""Padded losses over prefixes: states that may not stop, detailed balance, interpolated rewards.

Every equation is computed again in Python floats, one window or prefix at a time.
"""

import math

import pytest
import torch
from loss_cases import close, f64, padded_rows

import fastgfn.functional as F
from fastgfn.ops.residual import LOSSES
from fastgfn.reference.residual import residual_loss

GROUPS = torch.tensor([7, 7, -2, 7, -2, 30])
COUNTS = torch.tensor([2, 1, 3, 1, 0, 1])
# Rows 0, 2 and 4 cannot stop at s_0.
TERMINABLE = torch.tensor(
    [
        [0, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 1],
        [1, 0, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 1],
        [1, 0, 1, 1, 1, 1],
    ]
).bool()


def batch(lengths=(3, 1, 5, 0, 5, 2), dtype=torch.float64):
    """(log_pf, log_pterm, log_reward, lengths); NaN on the padding."""
    log_pf, states, lengths = padded_rows(lengths, dtype=dtype)
    return log_pf, *states, lengths


def masked(states, terminable):
    return [x.masked_fill(~terminable, torch.nan) for x in states]


def potentials(log_pf, log_pterm, log_reward, lengths):
    """Per row, U_k of every state."""
    return [
        [float(log_pf[row, :k].sum() + log_pterm[row, k] - log_reward[row, k]) for k in range(n + 1)]
        for row, n in enumerate(lengths.tolist())
    ]


def group_estimate(whole, counts, ids):
    """Per row, the mean of -U_n over its group."""
    mean = []
    for i in ids:
        peers = [k for k, other in enumerate(ids) if other == i]
        mass = sum(float(counts[k]) for k in peers)
        mean.append(-sum(float(counts[k]) * whole[k] for k in peers) / mass if mass else 0.0)
    return mean


# States that may not stop.


@pytest.mark.parametrize("log_z", [None, "scalar", "rows"])
@pytest.mark.parametrize("loss", ["squared", "linex"])
@pytest.mark.parametrize("subtb_lambda", [0.0, 0.7, 1.0])
def test_windows_of_terminable_states(subtb_lambda, loss, log_z):
    inputs = batch()
    u = potentials(*inputs)
    given = {"scalar": f64(0.3), "rows": torch.rand(6).double()}.get(log_z)
    ids = GROUPS.tolist()
    anchors = group_estimate([row[-1] for row in u], COUNTS, ids) if given is None else given.expand(6)
    nums, dens = [], []
    for row, n in enumerate(inputs[3].tolist()):
        states = [k for k in range(n + 1) if k == 0 or TERMINABLE[row, k]]
        values = [-float(anchors[row]) if not TERMINABLE[row, k] else u[row][k] for k in states]
        num = den = 0.0
        for i in range(len(states)):
            for j in range(i + 1, len(states)):
                weight = subtb_lambda ** (j - i - 1)
                num += weight * float(residual_loss(f64(values[j] - values[i]), loss))
                den += weight
        nums.append(num)
        dens.append(den)
    hidden = masked(inputs[1:3], TERMINABLE)
    options = dict(terminable=TERMINABLE, log_z=given, counts=COUNTS, loss=loss, reduction="none")
    if given is None:
        options["group_ids"] = GROUPS
    args = inputs[0], *hidden, inputs[3]
    value, weight = F.modified_subtb_loss(*args, subtb_lambda=subtb_lambda, return_weight=True, **options)
    close(value, f64(nums) * COUNTS)
    close(weight, f64(dens) * COUNTS)
    if subtb_lambda == 0:
        close(F.modified_detailed_balance_loss(*args, **options), value)


def test_all_states_may_stop():
    inputs = batch()
    every = torch.ones(6, 6, dtype=torch.bool)
    for include_sink in (False, True):
        for loss in ("squared", "linex"):
            options = dict(subtb_lambda=0.8, include_sink=include_sink, loss=loss)
            want = F.modified_subtb_loss(*inputs, **options)
            close(F.modified_subtb_loss(*inputs, terminable=every, **options), want)


def test_first_tokens_get_a_gradient_through_the_anchor():
    inputs = batch(lengths=(3, 4, 5, 2, 5, 3))
    may_stop = (torch.arange(6) >= 2).expand(6, 6)
    args = [x.nan_to_num(0.0).requires_grad_() for x in inputs[:3]]
    log_z = f64(0.5).requires_grad_()
    value = F.modified_subtb_loss(*args, inputs[3], terminable=may_stop, log_z=log_z)
    grads = torch.autograd.grad(value, [*args, log_z])
    is_step = torch.arange(5) < inputs[3][:, None]
    assert bool((grads[0][is_step] != 0).all()) and bool((grads[0][~is_step] == 0).all())
    valid = may_stop & (torch.arange(6) <= inputs[3][:, None])
    assert all(bool(((g != 0) == valid).all()) for g in grads[1:3]) and grads[3] != 0

    def run(*tensors):
        return F.modified_subtb_loss(*tensors[:3], inputs[3], terminable=may_stop, log_z=tensors[3])

    assert torch.autograd.gradcheck(run, [*args, log_z])


# Detailed balance.


@pytest.mark.parametrize("loss", LOSSES)
def test_detailed_balance_is_lambda_zero(loss):
    log_pf, log_pterm, log_reward, lengths = batch()
    log_pb = torch.randn(6, 5).double()
    residuals = [
        float(log_pterm[row, t] + log_pf[row, t] - log_pb[row, t] - log_pterm[row, t + 1])
        for row, n in enumerate(lengths.tolist())
        for t in range(n)
    ]
    value = F.detailed_balance_loss(log_pf, log_pterm, lengths, log_pb=log_pb, loss=loss)
    close(value, residual_loss(f64(residuals), loss).mean())
    for options in ({}, dict(weights=torch.rand(6).double(), normalization="group", group_ids=GROUPS)):
        options |= dict(loss=loss, counts=COUNTS)
        close(
            F.detailed_balance_loss(log_pf, log_pterm, lengths, **options),
            F.subtb_loss(log_pf, log_pterm, lengths, subtb_lambda=0.0, **options),
        )
        close(
            F.modified_detailed_balance_loss(log_pf, log_pterm, log_reward, lengths, **options),
            F.modified_subtb_loss(log_pf, log_pterm, log_reward, lengths, subtb_lambda=0.0, **options),
        )
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (log_pf, log_pterm, log_reward)]
    assert torch.autograd.gradcheck(
        lambda *x: F.modified_detailed_balance_loss(*x, lengths, loss=loss), leaves
    )
    assert torch.autograd.gradcheck(
        lambda *x: F.detailed_balance_loss(*x, lengths, log_pb=log_pb, loss=loss), leaves[:2]
    )


# Interpolated rewards.


# Row 2 was cut where it may not stop.
CUT = TERMINABLE & ~((torch.arange(6) == 2)[:, None] & (torch.arange(6) == 5))


@pytest.mark.parametrize("terminable", [None, TERMINABLE, CUT], ids=["all", "some", "cut"])
@pytest.mark.parametrize("segment", [1, 2, 3, 8])
def test_interpolated_log_reward(segment, terminable):
    _, _, log_reward, lengths = batch(lengths=(3, 1, 5, 0, 5, 2))
    want, read = torch.zeros(6, 6).double(), torch.zeros(6, 6, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        may = [k for k in range(n + 1) if terminable is None or terminable[row, k]]
        knots = [k for k in may if k % segment == 0 or k in (may[0], may[-1])]
        for k in may:
            before, after = max(x for x in knots if x <= k), min(x for x in knots if x >= k)
            share = (k - before) / max(1, after - before)
            want[row, k] = (1 - share) * log_reward[row, before] + share * log_reward[row, after]
        read[row, knots] = True
    hidden = log_reward.masked_fill(~read, torch.nan).requires_grad_()
    got = F.interpolated_log_reward(hidden, lengths, segment, terminable=terminable)
    close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    assert bool(((grad != 0) == read).all())


@pytest.mark.parametrize(
    "options", [{}, dict(loss="huber"), dict(subtb_lambda=0.6, normalization="trajectory")]
)
def test_interpolated_subtb(options):
    inputs = batch()
    reward = F.interpolated_log_reward(inputs[2], inputs[3], 2)
    shared = dict(weights=torch.rand(6).double(), counts=COUNTS) | options
    want = F.modified_subtb_loss(*inputs[:2], reward, inputs[3], **shared)
    close(F.interpolated_subtb_loss(*inputs, segment=2, **shared), want)
    close(F.interpolated_subtb_loss(*inputs, segment=1, **shared), F.modified_subtb_loss(*inputs, **shared))
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: F.interpolated_subtb_loss(*x, inputs[3], segment=3, **shared), leaves
    )
    log_z = torch.rand(6).double().requires_grad_()
    rooted = dict(shared, terminable=TERMINABLE)
    assert torch.autograd.gradcheck(
        lambda *x: F.interpolated_subtb_loss(*x[:3], inputs[3], segment=3, log_z=x[3], **rooted),
        [*leaves, log_z],
    )


# Refusals.


def test_refuses_inputs():
    inputs = [x.nan_to_num(0.0) for x in batch()]
    z = f64(0.0)
    for function in (F.modified_subtb_loss, F.modified_detailed_balance_loss, F.interpolated_subtb_loss):
        for options, kind, message in (
            (dict(log_z=z), ValueError, "log_z must be None without terminable, got a value"),
            (dict(terminable=TERMINABLE.long()), TypeError, "terminable must be bool, got torch.int64"),
            (dict(terminable=TERMINABLE[:, 1:]), ValueError, r"terminable must be \(6, 6\), got \(6, 5\)"),
            (dict(terminable=TERMINABLE, log_z=inputs[0]), ValueError, r"log_z must be \(\) or \(6,\)"),
            (dict(terminable=TERMINABLE, log_z=z, group_ids=GROUPS), ValueError, "group_ids must be None"),
            (dict(group_ids=GROUPS), ValueError, "group_ids must be None, got a tensor"),
            (dict(loss="huber", residual_limit=1.0), ValueError, "residual_limit must be None, got 1.0"),
        ):
            with pytest.raises(kind, match=f"{function.__name__}: {message}"):
                function(*inputs, **options)
    for segment in (0, -1, 2.5):
        with pytest.raises(ValueError, match="interpolated_subtb_loss: segment must be an integer >= 1"):
            F.interpolated_subtb_loss(*inputs, segment=segment)
        with pytest.raises(ValueError, match="interpolated_log_reward: segment must be an integer >= 1"):
            F.interpolated_log_reward(inputs[2], inputs[3], segment)
    with pytest.raises(ValueError, match=r"interpolated_log_reward: log_reward must be \(N, T \+ 1\)"):
        F.interpolated_log_reward(inputs[2][0], inputs[3], 2)
    with pytest.raises(ValueError, match="detailed_balance_loss: reduction must be one of"):
        F.detailed_balance_loss(*inputs[:2], inputs[3], reduction="max")
    for step in (F.modified_subtb_loss, F.interpolated_subtb_loss):
        with pytest.raises(ValueError, match=r"lengths\[2\] must be in \[0, T\] = \[0, 5\], got 6"):
            step(*inputs[:3], inputs[3] + 1, terminable=TERMINABLE | True)


def test_debug_reads_terminable_states_only():
    log_pf, log_pterm, log_reward, lengths = batch()
    args = log_pf, *masked((log_pterm, log_reward), TERMINABLE), lengths
    may_stop = TERMINABLE.clone()
    may_stop[3, 0] = True
    F.modified_subtb_loss(*args, terminable=may_stop, debug=True)
    args[2][2, 3] = -math.inf
    message = r"modified_detailed_balance_loss: log_reward\[2, 3\] must be finite, got -inf"
    with pytest.raises(RuntimeError, match=message):
        F.modified_detailed_balance_loss(*args, terminable=may_stop, debug=True)
