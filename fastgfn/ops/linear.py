"""Products with a weight: `product`, weights packed or quantised for reuse, and the LoRA layer as one op.

On CPU in float32 the products go to oneDNN, which torch itself uses for bfloat16 only; elsewhere to torch.
Equations: `reference/linear.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.quantized import (
    DTYPES,
    FLOAT8,
    QuantizedWeight,
    is_float8_shape,
    quantize_weight,
    quantized_product,
)

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_onednn = torch.ops.mkldnn._linear_pointwise.default if HAS_ONEDNN else None
# oneDNN compiles a kernel for every new shape, which below so many multiplications costs more than it saves:
# a small model's trees have another size every step.
FEWEST_PRODUCTS = 2**21
# The layout chosen for 8 rows or more serves every number of rows.
PACK_ROWS = 16


def product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """(..., N) = x (..., K) @ weight.T + bias, without gradient; weight (N, K), any strides, or of
    `packed` or `rollout_weight`."""
    if isinstance(weight, QuantizedWeight):
        return quantized_product(x, weight, bias)
    if weight.is_mkldnn or (_uses_onednn(x, weight) and x.numel() * weight.shape[0] >= FEWEST_PRODUCTS):
        # oneDNN reads a bias as if it were contiguous, and refuses weights whose rows overlap
        bias = None if bias is None else bias.contiguous()
        return _onednn(x, _separate(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


def _separate(weight: Tensor) -> Tensor:
    """weight, copied if its elements share memory."""
    if weight.is_mkldnn:
        return weight
    (near, inner), (far, outer) = sorted(zip(weight.stride(), weight.shape, strict=True))
    return weight if near > 0 and (outer == 1 or far >= near * inner) else weight.contiguous()


def packed(weight: Tensor) -> Tensor:
    """weight (N, K) in the layout that `product` reads fastest: a copy for that alone, or weight itself."""
    if _uses_onednn(weight, weight) or _packs_bfloat16(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return weight


def rollout_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | QuantizedWeight:
    """weight (N, K), `packed` in dtype or quantised to it; what float8 cannot take is in bfloat16."""
    if dtype == FLOAT8 and not is_float8_shape(weight):
        dtype = torch.bfloat16
    return quantize_weight(weight, dtype) if dtype in DTYPES else packed(weight.to(dtype))


def add_product(out: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> None:
    """out (n, N) += `product`, in one kernel where the product can add."""
    is_plain = isinstance(weight, Tensor) and not weight.is_mkldnn and not _uses_onednn(x, weight)
    if is_plain and bias is None and out.dtype == x.dtype:
        out.addmm_(x, weight.T)
    else:
        out.add_(product(x, weight, bias))


def _packs_bfloat16(weight: Tensor) -> bool:
    """torch sends bfloat16 products to oneDNN itself, and packs the weight in each."""
    usable = HAS_ONEDNN and torch.backends.mkldnn.enabled and weight.device.type == "cpu"
    return (
        usable
        and weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def lora_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K) frozen, any strides
    bias: Tensor | None,  # (N,) frozen
    lora_a: Tensor,  # (r, K)
    lora_b: Tensor,  # (N, r)
    scale: float,
) -> Tensor:
    """(..., N) = x (weight + scale * lora_b lora_a).T + bias, differentiable in x, lora_a and lora_b.

    All tensors have one dtype. Saved for backward: x and its (..., r) projection.
    """
    _check("lora_linear", x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
    rank = lora_a.shape[0]
    checks.check_shape("lora_linear", "lora_a", lora_a, (rank, weight.shape[1]), "pass (r, K)")
    checks.check_shape("lora_linear", "lora_b", lora_b, (weight.shape[0], rank), "pass (N, r)")
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out, _ = torch.ops.fastgfn.lora_linear(flat, weight, bias, lora_a, lora_b, scale)
    return out.view(*x.shape[:-1], weight.shape[0])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., N) = x weight.T + bias for a frozen weight (N, K) and bias (N,), differentiable in x."""
    _check("frozen_linear", x, weight=weight, bias=bias)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return torch.ops.fastgfn.frozen_linear(flat, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _check(function: str, x: Tensor, **others: Tensor | None) -> None:
    weight, bias = others["weight"], others["bias"]
    checks.check_shape(function, "weight", weight, ("N", x.shape[-1]), "pass (N, K) for x (..., K)")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            fix = "cast all to one dtype"
            checks.fail(function, name, x.dtype, tensor.dtype, fix, kind=checks.InputTypeError)
    for name, tensor in (("weight", weight), ("bias", bias)):
        frozen = tensor is None or not tensor.requires_grad
        checks.check(frozen, function, name, "frozen", "one that requires grad", "use torch.nn.Linear")


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    single = x.dtype == weight.dtype == torch.float32
    on_cpu = x.device.type == weight.device.type == "cpu"
    return HAS_ONEDNN and single and on_cpu and x.numel() > 0 and torch.backends.mkldnn.enabled


@torch.library.custom_op("fastgfn::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y (T, N) and the projection x lora_a.T (T, r)."""
    low = product(x, lora_a)
    return product(x, weight, bias).add_(product(low, lora_b), alpha=scale), low


@torch.library.custom_op("fastgfn::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor,  # (T, N)
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d x (T, K), or (0,) if not needed, d lora_a (r, K), d lora_b (N, r)."""
    grad_low = product(grad, lora_b.T).mul_(scale)
    grad_a = product(grad_low.T, x.T)
    grad_b = product(grad.T, low.T).mul_(scale)
    if not needs_x:
        return grad.new_empty(0), grad_a, grad_b
    return product(grad, weight.T).add_(product(grad_low, lora_a.T)), grad_a, grad_b


@torch.library.custom_op("fastgfn::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight.T + bias, (T, N)."""
    return product(x, weight, bias)


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scale):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@_lora_linear_backward.register_fake
def _(grad, x, low, weight, lora_a, lora_b, scale, needs_x):
    shapes = (x.shape if needs_x else (0,), lora_a.shape, lora_b.shape)
    return tuple(grad.new_empty(shape) for shape in shapes)


@_frozen_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b)


def _gradient(ctx, grad, unused):
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_a, grad_b = torch.ops.fastgfn.lora_linear_backward(
        grad, *ctx.saved_tensors, ctx.scale, needs_x
    )
    return grad_x if needs_x else None, None, None, grad_a, grad_b, None


def _save_weight(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _gradient_of_input(ctx, grad):
    (weight,) = ctx.saved_tensors
    return torch.ops.fastgfn.frozen_linear(grad, weight.T, None), None, None


torch.library.register_autograd("fastgfn::lora_linear", _gradient, setup_context=_save)
torch.library.register_autograd("fastgfn::frozen_linear", _gradient_of_input, setup_context=_save_weight)
