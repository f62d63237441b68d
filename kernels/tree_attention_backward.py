"""Attention over one packed token tree, backward; visibility, plans and NaN as in tree_attention.py.

With s the scores, p = exp(s - lse), dp = d_out v^T and delta = sum(out * d_out) - d_lse, ds is
p * (dp - delta).
Keys and values gather from every query that sees them, so the blocks near a root take longest; they start
first. Per pair of blocks four products for d_key and d_value and three for d_query, against two forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.tree_attention import (
    BLOCK_ROWS,
    LOG2E,
    cap,
    constants,
    dot,
    find_faults,
    narrow,
    scales,
    sees,
    table,
    tile,
)


# One program reduces one block of rows of one head. Grid (blocks of rows, H).
# Writes delta (H, T) float32 = sum over d of out * grad_out, less grad_lse.
@triton.jit
def _tree_attention_delta_kernel(
    out_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    delta_ptr,
    stride_out_h,
    stride_out_t,
    stride_grad_h,
    stride_grad_t,
    size,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = first + rows < size
    out_ptr += head * stride_out_h + first * stride_out_t
    grad_out_ptr += head * stride_grad_h + first * stride_grad_t
    out = tile(out_ptr, stride_out_t, inside, BLOCK, HEAD_DIM, BLOCK_D).to(tl.float32)
    grad_out = tile(grad_out_ptr, stride_grad_t, inside, BLOCK, HEAD_DIM, BLOCK_D).to(tl.float32)
    at = head * size + first + rows
    grad_lse = tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    tl.store(delta_ptr + at, tl.sum(out * grad_out, axis=1) - grad_lse, mask=inside)


@triton.jit
def _weights(
    z, lse, dp, delta, visible, pre_scale, post_scale, HAS_SOFTCAP: tl.constexpr, IS_FULL: tl.constexpr
):
    """p and ds / scale of one pair of blocks, from z = q k^T and lse in units of log 2; 0 where invisible."""
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = cap(z * pre_scale)
    p = tl.exp2(z * post_scale - lse)
    ds = p * (dp - delta) * slope
    if not IS_FULL:
        p = tl.where(visible, p, 0.0)
        ds = tl.where(visible, ds, 0.0)
    return p, ds


@triton.jit
def _gather(
    q, k, v, grad_out, lse, delta, visible, grad_k, grad_v, pre_scale, post_scale,
    HAS_SOFTCAP: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to the gradients of one block of keys and values."""
    zeros = tl.zeros((k.shape[0], q.shape[0]), tl.float32)
    dp = dot(v, tl.trans(grad_out), zeros)
    z = dot(k, tl.trans(q), zeros)
    p, ds = _weights(z, lse[None], dp, delta[None], visible, pre_scale, post_scale, HAS_SOFTCAP, IS_FULL)
    grad_v = dot(narrow(p, grad_out.dtype), grad_out, grad_v)
    grad_k = dot(narrow(ds, q.dtype), q, grad_k)
    return grad_k, grad_v


# One program owns one block of keys and values and gathers from every query head of its group and every block
# of queries of its plan. Grid (blocks of keys, Hkv), those nearest the root first.
# Writes grad_key and grad_value in their dtype.
@triton.jit
def _tree_attention_grad_kv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    end_ptr,
    position_ptr,
    plan_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    stride_query_h,
    stride_query_t,
    stride_key_h,
    stride_key_t,
    stride_value_h,
    stride_value_t,
    stride_grad_out_h,
    stride_grad_out_t,
    stride_grad_h,
    stride_grad_t,
    stride_plan,
    size,
    repeat,
    window,
    scale,
    pre_scale,
    post_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    first = block * BLOCK_K
    j = first.to(tl.int32) + tl.arange(0, BLOCK_K)
    key_ptr += kv_head * stride_key_h + first * stride_key_t
    value_ptr += kv_head * stride_value_h + first * stride_value_t
    plan_ptr += block * stride_plan
    num_full = tl.load(plan_ptr)
    num_partial = tl.load(plan_ptr + 1) - num_full

    k = tile(key_ptr, stride_key_t, j < size, BLOCK_K, HEAD_DIM, BLOCK_D)
    v = tile(value_ptr, stride_value_t, j < size, BLOCK_K, HEAD_DIM, BLOCK_D)
    end = tl.load(end_ptr + j, mask=j < size, other=0)
    position = end
    if HAS_WINDOW:
        position = tl.load(position_ptr + j, mask=j < size, other=0)
    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # one loop over (head, block), so that a short plan does not drain the pipeline once per head
    for n in range(num_full * repeat):
        head = kv_head * repeat + n // num_full
        start = tl.load(plan_ptr + 2 + n % num_full).to(tl.int64) * BLOCK_Q
        i = start.to(tl.int32) + tl.arange(0, BLOCK_Q)
        at = query_ptr + head * stride_query_h + start * stride_query_t
        q = tile(at, stride_query_t, i < size, BLOCK_Q, HEAD_DIM, BLOCK_D)
        at = grad_out_ptr + head * stride_grad_out_h + start * stride_grad_out_t
        grad_out = tile(at, stride_grad_out_t, i < size, BLOCK_Q, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + head * size + i, mask=i < size, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + head * size + i, mask=i < size, other=0.0)
        grad_k, grad_v = _gather(
            q, k, v, grad_out, lse, delta, None, grad_k, grad_v, pre_scale, post_scale, HAS_SOFTCAP, True
        )
    for n in range(num_partial * repeat):
        head = kv_head * repeat + n // num_partial
        start = tl.load(plan_ptr + 2 + num_full + n % num_partial).to(tl.int64) * BLOCK_Q
        i = start.to(tl.int32) + tl.arange(0, BLOCK_Q)
        lse = tl.load(lse_ptr + head * size + i, mask=i < size, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + head * size + i, mask=i < size, other=0.0)
        # a query that is not finite shows in lse, a gradient in delta: read as 0, with weights of NaN
        sound = (tl.abs(lse) < float("inf")) & (tl.abs(delta) < float("inf"))
        lse = tl.where(sound, lse, float("nan"))
        inside = (i < size) & sound
        at = query_ptr + head * stride_query_h + start * stride_query_t
        q = tile(at, stride_query_t, inside, BLOCK_Q, HEAD_DIM, BLOCK_D)
        at = grad_out_ptr + head * stride_grad_out_h + start * stride_grad_out_t
        grad_out = tile(at, stride_grad_out_t, inside, BLOCK_Q, HEAD_DIM, BLOCK_D)
        lowest = i
        if HAS_WINDOW:
            lowest = tl.load(position_ptr + i, mask=i < size, other=0) - window
        visible = sees(i[None], j[:, None], end[:, None], lowest[None], position[:, None], HAS_WINDOW)
        grad_k, grad_v = _gather(
            q, k, v, grad_out, lse, delta, visible, grad_k, grad_v, pre_scale, post_scale, HAS_SOFTCAP, False
        )

    rows = tl.arange(0, BLOCK_K)[:, None]
    columns = tl.arange(0, BLOCK_D)[None]
    inside = (first + rows < size) & (columns < HEAD_DIM)
    at = kv_head * stride_grad_h + (first + rows) * stride_grad_t + columns
    tl.store(grad_key_ptr + at, narrow(grad_k * scale, grad_key_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_value_ptr + at, narrow(grad_v, grad_value_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scatter(
    q, k, v, grad_out, fault, lse, delta, visible, grad_q, pre_scale, post_scale,
    HAS_SOFTCAP: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the gradient of one block of queries."""
    zeros = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    z = dot(q, tl.trans(k), zeros)
    dp = dot(grad_out, tl.trans(v), zeros)
    if not IS_FULL:
        dp += fault[None]
    _, ds = _weights(
        z, lse[:, None], dp, delta[:, None], visible, pre_scale, post_scale, HAS_SOFTCAP, IS_FULL
    )
    return dot(narrow(ds, k.dtype), k, grad_q)


# One program owns one block of queries of one head and reads the key blocks of its plan, as the forward does.
# Grid (blocks of queries, H), the last rows first. Writes grad_query in its dtype.
@triton.jit
def _tree_attention_grad_q_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    end_ptr,
    position_ptr,
    plan_ptr,
    faults_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    stride_query_h,
    stride_query_t,
    stride_key_h,
    stride_key_t,
    stride_value_h,
    stride_value_t,
    stride_grad_out_h,
    stride_grad_out_t,
    stride_grad_h,
    stride_grad_t,
    stride_plan,
    size,
    repeat,
    window,
    scale,
    pre_scale,
    post_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = block * BLOCK_Q
    i = first.to(tl.int32) + tl.arange(0, BLOCK_Q)
    query_ptr += head * stride_query_h + first * stride_query_t
    grad_out_ptr += head * stride_grad_out_h + first * stride_grad_out_t
    key_ptr += head // repeat * stride_key_h
    value_ptr += head // repeat * stride_value_h
    plan_ptr += block * stride_plan
    faults_ptr += head // repeat * size
    num_full = tl.load(plan_ptr)
    num_seen = tl.load(plan_ptr + 1)

    q = tile(query_ptr, stride_query_t, i < size, BLOCK_Q, HEAD_DIM, BLOCK_D)
    grad_out = tile(grad_out_ptr, stride_grad_out_t, i < size, BLOCK_Q, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + head * size + i, mask=i < size, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + head * size + i, mask=i < size, other=0.0)
    lowest = i
    if HAS_WINDOW:
        lowest = tl.load(position_ptr + i, mask=i < size, other=0) - window
    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for n in range(num_full):
        start = tl.load(plan_ptr + 2 + n).to(tl.int64) * BLOCK_K
        k = tile(key_ptr + start * stride_key_t, stride_key_t, None, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = tile(value_ptr + start * stride_value_t, stride_value_t, None, BLOCK_K, HEAD_DIM, BLOCK_D)
        grad_q = _scatter(
            q, k, v, grad_out, None, lse, delta, None, grad_q, pre_scale, post_scale, HAS_SOFTCAP, True
        )
    for n in range(num_full, num_seen):
        start = tl.load(plan_ptr + 2 + n).to(tl.int64) * BLOCK_K
        j = start.to(tl.int32) + tl.arange(0, BLOCK_K)
        end = tl.load(end_ptr + j, mask=j < size, other=0)
        # a key that is not finite is read as 0; a NaN of dp makes what sees it NaN
        fault = tl.load(faults_ptr + j, mask=j < size, other=0.0)
        inside = (j < size) & (fault == 0.0)
        k = tile(key_ptr + start * stride_key_t, stride_key_t, inside, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = tile(value_ptr + start * stride_value_t, stride_value_t, j < size, BLOCK_K, HEAD_DIM, BLOCK_D)
        position = end
        if HAS_WINDOW:
            position = tl.load(position_ptr + j, mask=j < size, other=0)
        visible = sees(i[:, None], j[None], end[None], lowest[:, None], position[None], HAS_WINDOW)
        grad_q = _scatter(
            q, k, v, grad_out, fault, lse, delta, visible, grad_q, pre_scale, post_scale, HAS_SOFTCAP, False
        )

    rows = tl.arange(0, BLOCK_Q)[:, None]
    columns = tl.arange(0, BLOCK_D)[None]
    at = grad_query_ptr + head * stride_grad_h + (first + rows) * stride_grad_t + columns
    grad = narrow(grad_q * scale, grad_query_ptr.dtype.element_ty)
    tl.store(at, grad, mask=(first + rows < size) & (columns < HEAD_DIM))


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    heads, size, width = out.shape
    delta = torch.empty_like(grad_lse)
    _tree_attention_delta_kernel[(triton.cdiv(size, BLOCK_ROWS), heads)](
        out,
        grad_out,
        grad_lse,
        delta,
        *out.stride()[:2],
        *grad_out.stride()[:2],
        size,
        HEAD_DIM=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK=BLOCK_ROWS,
    )
    return delta


def tree_attention_bwd(
    grad_out: Tensor,  # (H, T, d) last stride 1
    grad_lse: Tensor,  # (H, T) float32, contiguous
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,  # (H, T) float32, contiguous
    end: Tensor,  # (T,) int32
    position: Tensor,  # (T,) int32
    plan_q: Tensor,  # (blocks of queries, 2 + blocks of keys) int32, for grad_q's blocks
    plan_kv: Tensor,  # (blocks of keys, 2 + blocks of queries) int32, for grad_kv's blocks
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes, as views of (T, H, d)."""
    heads, size, width = query.shape
    kv_heads = key.shape[0]
    grad_query, grad_key, grad_value = (
        x.new_empty(size, x.shape[0], width).transpose(0, 1) for x in (query, key, value)
    )
    if not size:
        return grad_query, grad_key, grad_value
    blocks = table(query, softcap, window)
    inputs = (query, key, value, end, position)
    strides = [s for x in (query, key, value, grad_out) for s in x.stride()[:2]]
    numbers = (size, heads // kv_heads, 0 if window is None else window, scale, *scales(scale, softcap))
    with torch.cuda.device_of(query):
        delta = _delta(out, grad_out, grad_lse)
        _tree_attention_grad_kv_kernel[(plan_kv.shape[0], kv_heads)](
            *inputs,
            plan_kv,
            grad_out,
            lse,
            delta,
            grad_key,
            grad_value,
            *strides,
            *grad_key.stride()[:2],
            plan_kv.stride(0),
            *numbers,
            **constants(query, blocks.grad_kv, softcap, window),
        )
        _tree_attention_grad_q_kernel[(plan_q.shape[0], heads)](
            *inputs,
            plan_q,
            find_faults(key, value),
            grad_out,
            lse,
            delta,
            grad_query,
            *strides,
            *grad_query.stride()[:2],
            plan_q.stride(0),
            *numbers,
            **constants(query, blocks.grad_q, softcap, window),
        )
    return grad_query, grad_key, grad_value
