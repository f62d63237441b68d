"""The elementwise work of a decoding step between the products and the attention of a layer.

Equations: fastgfn/reference/decode_layer.py. All sums in float32. Each kernel reads and writes its rows once,
some 10 KB per row of a small model: a launch, 2 to 3 us in a graph, bounds them up to hundreds of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Widest row -> warps of a program that holds it.
NORM_WARPS = ((1024, 4), (4096, 8), (16384, 16))
# (columns of one tile, warps).
GATE_TILE = (512, 2)


# One program takes one row: adds delta to it, if any, rounds the sum to the row's type, and divides it by the
# root of its mean square. Grid (rows,). Writes out (n, D), and with delta the sum (n, D).
@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    stride_x_n,
    stride_delta_n,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    kind = weight_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_x_n + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row * stride_delta_n + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * width + column, x.to(sum_ptr.dtype.element_ty), mask=inside)
        if not IS_INTERPRETED:
            x = x.to(kind).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    if not IS_INTERPRETED:
        x = x.to(kind).to(tl.float32)
    tl.store(out_ptr + row * width + column, (x * weight).to(out_ptr.dtype.element_ty), mask=inside)


# One program takes one head of one row of queries, keys and values: normalises (queries and keys, HAS_NORM)
# and rotates it (queries and keys). Grid (rows, H + 2 Hkv). Writes the queries (n, H, d), and keys and values
# at the row's node of their pools (C, Hkv, d).
@triton.jit
def _rope_write_fwd_kernel(
    row_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    nodes_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    stride_row_n,
    stride_cos_n,
    stride_sin_n,
    num_heads,
    num_kv_heads,
    eps,
    HAS_NORM: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    left = tl.arange(0, BLOCK)
    inside = left < HALF
    right = left + HALF
    kind = keys_ptr.dtype.element_ty
    own = row_ptr + row * stride_row_n + head * WIDTH
    a = tl.load(own + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(own + right, mask=inside, other=0.0).to(tl.float32)
    is_query, is_key = head < num_heads, head < num_heads + num_kv_heads
    if HAS_NORM:
        if is_key:
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / WIDTH + eps)
            a, b = a * scale, b * scale
            if not IS_INTERPRETED:
                a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
            weight = query_weight_ptr if is_query else key_weight_ptr
            a *= tl.load(weight + left, mask=inside, other=0.0).to(tl.float32)
            b *= tl.load(weight + right, mask=inside, other=0.0).to(tl.float32)
    if is_key:
        cos, sin = cos_ptr + row * stride_cos_n, sin_ptr + row * stride_sin_n
        cos_a = tl.load(cos + left, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + right, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + left, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + right, mask=inside, other=0.0).to(tl.float32)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    if is_query:
        out = query_ptr + (row * num_heads + head) * WIDTH
    else:
        node = tl.load(nodes_ptr + row)
        pool = keys_ptr if is_key else values_ptr
        out = pool + (node * num_kv_heads + (head - num_heads) % num_kv_heads) * WIDTH
    tl.store(out + left, a.to(kind), mask=inside)
    tl.store(out + right, b.to(kind), mask=inside)


# One program takes BLOCK columns of one row of gates, then ups: silu(gate) * up. Grid (rows, tiles). Writes
# out (n, F).
@triton.jit
def _silu_mul_fwd_kernel(row_ptr, out_ptr, stride_row_n, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    own = row_ptr + row * stride_row_n
    gate = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(own + width + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


IS_INTERPRETED = not isinstance(_silu_mul_fwd_kernel, triton.JITFunction)


def _kind(dtype: torch.dtype) -> torch.dtype:
    """The interpreter cuts bfloat16 off where a GPU rounds: it writes float32, which torch rounds."""
    return torch.float32 if IS_INTERPRETED else dtype


def rms_norm(
    x: Tensor,  # (n, D) contiguous rows
    delta: Tensor | None,  # (n, D) contiguous rows
    weight: Tensor,  # (D,) of x's dtype
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """x + delta (n, D), if there is a delta, and its norm (n, D)."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, width, dtype=_kind(x.dtype), device=x.device)
    total = None if delta is None else torch.empty_like(out)
    if out.numel():
        with torch.cuda.device_of(x):
            _rms_norm_fwd_kernel[(num_rows,)](
                x,
                delta,
                weight,
                total,
                out,
                x.stride(0),
                0 if delta is None else delta.stride(0),
                width,
                eps,
                HAS_DELTA=delta is not None,
                IS_INTERPRETED=IS_INTERPRETED,
                BLOCK=triton.next_power_of_2(width),
                num_warps=next(warps for widest, warps in NORM_WARPS if width <= widest),
            )
    return None if total is None else total.to(x.dtype), out.to(x.dtype)


def rope_write(
    row: Tensor,  # (n, (H + 2 Hkv) d) contiguous rows
    cos: Tensor,  # (n, d) contiguous rows
    sin: Tensor,  # (n, d) contiguous rows
    query_weight: Tensor | None,  # (d,) for the norms
    key_weight: Tensor | None,  # (d,)
    eps: float,
    nodes: Tensor,  # (n,) int64
    keys: Tensor,  # (C, Hkv, d) contiguous
    values: Tensor,  # (C, Hkv, d) contiguous
) -> Tensor:
    """(n, H, d) queries; writes keys and values."""
    num_rows, (_, kv_heads, width) = row.shape[0], keys.shape
    heads = row.shape[1] // width - 2 * kv_heads
    query = torch.empty(num_rows, heads, width, dtype=_kind(keys.dtype), device=row.device)
    pools = keys.to(_kind(keys.dtype)), values.to(_kind(values.dtype))
    if query.numel():
        with torch.cuda.device_of(row):
            _rope_write_fwd_kernel[(num_rows, heads + 2 * kv_heads)](
                row,
                cos,
                sin,
                query_weight,
                key_weight,
                nodes,
                query,
                *pools,
                row.stride(0),
                cos.stride(0),
                sin.stride(0),
                heads,
                kv_heads,
                eps,
                HAS_NORM=query_weight is not None,
                IS_INTERPRETED=IS_INTERPRETED,
                WIDTH=width,
                BLOCK=triton.next_power_of_2(width // 2),
                num_warps=1,
            )
    for pool, written in zip((keys, values), pools, strict=True):
        if written is not pool:
            pool.copy_(written)
    return query.to(keys.dtype)


def silu_mul(row: Tensor) -> Tensor:
    """(n, F) from rows (n, 2 F), contiguous."""
    num_rows, width = row.shape[0], row.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=_kind(row.dtype), device=row.device)
    if out.numel():
        block, num_warps = GATE_TILE
        with torch.cuda.device_of(row):
            _silu_mul_fwd_kernel[(num_rows, triton.cdiv(width, block))](
                row, out, row.stride(0), width, BLOCK=block, num_warps=num_warps
            )
    return out.to(row.dtype)
