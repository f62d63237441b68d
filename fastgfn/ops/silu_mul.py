"""silu(gate) * up as one op that saves only its inputs. Equation: `reference/silu_mul.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgfn import checks


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the common shape and dtype of the two; differentiable in both, once."""
    checks.check_shape("silu_mul", "up", up, tuple(gate.shape), "pass the two halves of one projection")
    checks.check_floating("silu_mul", "gate", gate)
    if up.dtype != gate.dtype:
        checks.fail("silu_mul", "up", gate.dtype, up.dtype, "cast it", kind=checks.InputTypeError)
    return torch.ops.fastgfn.silu_mul(gate, up)


@torch.library.custom_op("fastgfn::silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)


@torch.library.custom_op("fastgfn::silu_mul_backward", mutates_args=())
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d gate and d up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@_silu_mul.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@_backward.register_fake
def _(grad, gate, up):
    return torch.empty_like(gate), torch.empty_like(gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    return torch.ops.fastgfn.silu_mul_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("fastgfn::silu_mul", _gradient, setup_context=_save)
