"""The residual losses: values and slopes against the plain truth, the tangents, the limit, refusals."""

import pytest
import torch

from fastgfn.ops.residual import LOSSES, residual_loss, value_and_slope
from fastgfn.reference import residual as reference
from fastgfn.testing import assert_close_to_truth

POINTS = (-200.0, -80.0, -7.5, -1.0, -0.3, -1e-9, 0.0, 1e-9, 0.4, 1.0, 2.0, 30.0, 79.0, 81.0, 99.0)


@pytest.mark.parametrize(("loss", "limit"), [*((loss, None) for loss in LOSSES), ("clamped", 5.0)])
def test_values_and_slopes(loss, limit):
    x = torch.tensor(POINTS, dtype=torch.float64)
    truth = reference.residual_loss(x.requires_grad_(), loss, limit or 100.0)
    (want,) = torch.autograd.grad(truth.sum(), x)
    leaf = x.detach().clone().requires_grad_()
    value = residual_loss(leaf, loss, limit)
    (got,) = torch.autograd.grad(value.sum(), leaf)
    # The truth of tiny residuals is a difference of exponentials, good to 1e-16 of their size.
    torch.testing.assert_close(value, truth, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(value_and_slope(x.detach(), loss, limit)[1], want, rtol=1e-13, atol=1e-15)
    naive = reference.residual_loss(x.detach().float(), loss, limit or 100.0)
    fused = residual_loss(x.detach().float(), loss, limit)
    assert_close_to_truth(loss, fused, naive, truth.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    x = torch.tensor([-5.5, -0.7, 0.2, 3.1, 7.0], dtype=torch.float64, requires_grad=True)
    limit = 6.0 if loss == "clamped" else None
    assert torch.autograd.gradcheck(lambda r: residual_loss(r, loss, limit), x)


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_with_zero_slope_only_at_zero(loss):
    value, slope = value_and_slope(torch.tensor([0.0, -2.0, 2.0], dtype=torch.float64), loss)
    assert value[0] == slope[0] == 0 and bool((value[1:] > 0).all())
    assert slope[1] < 0 < slope[2]


def test_clamped_residuals_beyond_the_limit_get_no_gradient():
    x = torch.tensor([-7.0, -2.0, 2.0, 1e30], requires_grad=True)
    value = residual_loss(x, "clamped", 3.0)
    assert value.tolist() == [9.0, 4.0, 4.0, 9.0]
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [0.0, -4.0, 4.0, 0.0]


@pytest.mark.parametrize("loss", ["huber", "shifted_cosh", "linex", "clamped"])
def test_far_residuals_stay_finite_in_float32(loss):
    x = torch.tensor([-1e3, 1e3], requires_grad=True)
    value = residual_loss(x, loss)
    assert bool(value.isfinite().all())
    assert bool(torch.autograd.grad(value.sum(), x)[0].isfinite().all())


def test_refuses_a_name():
    with pytest.raises(ValueError, match="residual_loss: loss must be one of squared, .*clamped, got 'l1'"):
        residual_loss(torch.zeros(2), "l1")
