import pytest
import torch
from torch.library import opcheck

from fastgfn.ops.silu_mul import silu_mul
from fastgfn.reference.silu_mul import silu_mul as reference
from fastgfn.testing import assert_close_to_truth


def run(function, gate, up):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = function(gate, up)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (1, 5, 16), (1,), (0, 4)])
def test_equals_reference_with_gradients(dtype, shape):
    gate, up = (4 * torch.randn(shape, dtype=torch.float64)).to(dtype), torch.randn(shape).to(dtype)
    truth = run(reference, gate.double(), up.double())
    naive, fused = run(reference, gate, up), run(silu_mul, gate, up)
    for i, values in enumerate(zip(fused, naive, truth, strict=True)):
        assert_close_to_truth(f"value {i}", *values, grad=i > 0)


def test_gradcheck_extremes_and_repeat():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(silu_mul, (gate, up))
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    assert all(t.isfinite().all() for t in run(silu_mul, far, torch.ones(5)))
    strided = torch.randn(6, 8)
    first, second = (run(silu_mul, strided[:, ::2], strided[:, 1::2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    opcheck(torch.ops.fastgfn.silu_mul.default, (gate, up))
    opcheck(torch.ops.fastgfn.silu_mul_backward.default, (torch.ones(3, 4), gate.detach(), up.detach()))


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"silu_mul: up must be \(3, 4\), got \(3, 5\)"):
        silu_mul(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(TypeError, match="silu_mul: up must be torch.float32, got torch.float64"):
        silu_mul(torch.ones(3), torch.ones(3).double())
    with pytest.raises(TypeError, match="silu_mul: gate must be floating point, got torch.int64"):
        silu_mul(torch.ones(3).long(), torch.ones(3).long())
