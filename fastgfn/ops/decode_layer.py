"""The elementwise work of a decoding step, without gradient: `rms_norm`, `add_rms_norm`, `rope_write` and
`silu_mul_row`, each one kernel on CUDA.

Equations: fastgfn/reference/decode_layer.py. Statistics of norms in float32, sums and products of 16-bit
numbers too, rounded where a result is stored. CUDA: Triton, kernels/decode_layer.py. CPU: torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgfn import checks

Norms = tuple[Tensor, Tensor]
# Of the rows that a norm takes on CUDA: a program holds one.
MAX_WIDTH = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of x (n, D) and weight (D,), of one dtype."""
    _check_norm("rms_norm", x, weight)
    return torch.ops.fastgfn.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its `rms_norm`), both (n, D) of x's dtype; delta may have another."""
    _check_norm("add_rms_norm", x, weight)
    if delta.shape != x.shape:
        checks.check_shape("add_rms_norm", "delta", delta, tuple(x.shape), "pass what is to be added")
    return torch.ops.fastgfn.add_rms_norm(x, delta, weight, eps)


def rope_write(
    row: Tensor,  # (n, (H + 2 Hkv) d): queries, keys, values
    cos: Tensor,  # (n, d)
    sin: Tensor,  # (n, d)
    nodes: Tensor,  # (n,) int64, distinct
    keys: Tensor,  # (C, Hkv, d) contiguous
    values: Tensor,  # (C, Hkv, d) contiguous
    norms: Norms | None = None,  # weights (d,) of the norms of queries and keys
    eps: float = 0.0,
) -> Tensor:
    """(n, H, d), the queries, rotated, of the dtype of the pools; keys, rotated, and values are written at
    `nodes` of the pools.

    norms: queries and keys are normalised before. On CUDA nodes are not checked.
    """
    (_, kv_heads, width), fix = keys.shape, "pass the products of one layer and its pools"
    heads, rest = divmod(row.shape[1], width)
    ok = rest == 0 and heads > 2 * kv_heads and width % 2 == 0
    want = f"(n, (H + 2 * {kv_heads}) * {width}) of even head width"
    checks.check(ok, "rope_write", "row", want, tuple(row.shape), fix)
    for name, x in (("cos", cos), ("sin", sin)):
        checks.check_shape("rope_write", name, x, (len(row), width), fix)
    checks.check_shape("rope_write", "nodes", nodes, (len(row),), "pass one node per row")
    checks.check_shape("rope_write", "values", values, tuple(keys.shape), fix)
    for x in norms or ():
        checks.check_shape("rope_write", "norms", x, (width,), "pass the weights of both")
    if values.dtype != keys.dtype:
        have, fix = values.dtype, "allocate both alike"
        checks.fail("rope_write", "values", keys.dtype, have, fix, kind=checks.InputTypeError)
    return torch.ops.fastgfn.rope_write(row, cos, sin, nodes, keys, values, *(norms or (None, None)), eps)


def silu_mul_row(row: Tensor) -> Tensor:
    """silu(gate) * up (n, F) from rows (n, 2 F) of gates, then ups."""
    ok = row.dim() == 2 and row.shape[1] % 2 == 0
    checks.check(ok, "silu_mul_row", "row", "(n, 2 F)", tuple(row.shape), "pass gates and ups in one row")
    checks.check_floating("silu_mul_row", "row", row)
    return torch.ops.fastgfn.silu_mul_row(row)


def rope(
    row: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, norms: Norms | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries (n, H, d), keys, values (n, Hkv, d)) of `dtype`, by torch; see `rope_write`."""
    wide = torch.promote_types(dtype, torch.float32)
    both = row.view(len(row), row.shape[1] // cos.shape[1], cos.shape[1])
    values = both[:, -kv_heads:].to(dtype)
    both = both[:, :-kv_heads].to(wide)
    heads = both.shape[1] - kv_heads
    if norms is not None:
        weight = torch.cat([w.expand(n, -1) for w, n in zip(norms, (heads, kv_heads), strict=True)])
        both = (_normalised(both, eps).to(dtype) * weight).to(wide)
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        x.chunk(2, -1) for x in (both, cos[:, None].to(wide), sin[:, None].to(wide))
    )
    out = torch.empty_like(both)
    torch.mul(a, cos_a, out=out[..., : a.shape[-1]]).addcmul_(b, sin_a, value=-1)
    torch.mul(b, cos_b, out=out[..., a.shape[-1] :]).addcmul_(a, sin_b)
    out = out.to(dtype)
    return out[:, :heads], out[:, heads:], values


def _normalised(x: Tensor, eps: float) -> Tensor:
    """In float32, as the models do it, whatever x is."""
    x = x.to(torch.float32)
    return x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalised(x, eps).to(x.dtype).mul_(weight)


def _add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (x + delta).to(x.dtype)
    return total, _rms_norm(total, weight, eps)


def _rope_write(row, cos, sin, nodes, keys, values, query_weight, key_weight, eps) -> Tensor:
    norms = None if query_weight is None else (query_weight, key_weight)
    query, *new = rope(row, cos, sin, keys.shape[1], norms, eps, keys.dtype)
    for pool, x in zip((keys, values), new, strict=True):
        pool.index_copy_(0, nodes, x)
    return query.contiguous()


def _silu_mul_row(row: Tensor) -> Tensor:
    gate, up = row.to(torch.promote_types(row.dtype, torch.float32)).chunk(2, -1)
    return F.silu(gate).mul_(up).to(row.dtype)


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from fastgfn.kernels import decode_layer as kernels

    _check_width("rms_norm", x)
    return kernels.rms_norm(_rows("rms_norm", x), None, weight.contiguous(), eps)[1]


def _add_rms_norm_triton(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from fastgfn.kernels import decode_layer as kernels

    _check_width("add_rms_norm", x)
    x, delta = (_rows("add_rms_norm", t) for t in (x, delta))
    return kernels.rms_norm(x, delta, weight.contiguous(), eps)


def _rope_write_triton(row, cos, sin, nodes, keys, values, query_weight, key_weight, eps) -> Tensor:
    from fastgfn.kernels import decode_layer as kernels

    ok, fix = keys.is_contiguous() and values.is_contiguous(), "write to the pools themselves"
    checks.check(ok, "rope_write", "keys and values", "contiguous on CUDA", keys.stride(), fix)
    row, cos, sin = (_rows("rope_write", x) for x in (row, cos, sin))
    weights = (None if w is None else w.contiguous() for w in (query_weight, key_weight))
    return kernels.rope_write(row, cos, sin, *weights, eps, nodes.contiguous(), keys, values)


def _silu_mul_row_triton(row: Tensor) -> Tensor:
    from fastgfn.kernels import decode_layer as kernels

    return kernels.silu_mul(_rows("silu_mul_row", row))


def _rows(function: str, x: Tensor) -> Tensor:
    """x with contiguous rows."""
    if x.dtype == torch.float64:
        fix = "cast the model to float32"
        checks.fail(function, "input", "below float64 on CUDA", x.dtype, fix, kind=checks.InputTypeError)
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_width(function: str, x: Tensor) -> None:
    want, fix = f"at most {MAX_WIDTH} wide on CUDA", "use the norm of the model"
    checks.check(x.shape[1] <= MAX_WIDTH, function, "x", want, x.shape[1], fix)


def _check_norm(function: str, x: Tensor, weight: Tensor) -> None:
    checks.check_floating(function, "x", x)
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        checks.check_shape(function, "x", x, ("n", "D"), "flatten it")
        checks.check_shape(function, "weight", weight, tuple(x.shape[1:]), "pass one weight per column")
    if weight.dtype != x.dtype:
        checks.fail(function, "weight", x.dtype, weight.dtype, "cast it", kind=checks.InputTypeError)


def _define(schema: str, cpu, cuda, fake) -> None:
    name = f"fastgfn::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu", cpu)
    torch.library.impl(name, "cuda", cuda)
    torch.library.register_fake(name, fake)


# Defined without autograd and its wrappers: these ops are called hundreds of times per token.
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    _rms_norm_triton,
    lambda x, weight, eps: x.new_empty(x.shape),
)
_define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    _add_rms_norm_triton,
    lambda x, delta, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_define(
    "rope_write(Tensor row, Tensor cos, Tensor sin, Tensor nodes, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor? query_weight, Tensor? key_weight, float eps) -> Tensor",
    _rope_write,
    _rope_write_triton,
    lambda row, cos, sin, nodes, keys, values, query_weight, key_weight, eps: keys.new_empty(
        row.shape[0], row.shape[1] // keys.shape[2] - 2 * keys.shape[1], keys.shape[2]
    ),
)
_define(
    "silu_mul_row(Tensor row) -> Tensor",
    _silu_mul_row,
    _silu_mul_row_triton,
    lambda row: row.new_empty(row.shape[0], row.shape[1] // 2),
)
