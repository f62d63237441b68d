"""Attention of decoded tokens over their paths in a pool of keys and values.

Equation: fastgfn/reference/attention.py. A row reads the keys and values of its whole path, 4 d bytes per
node and key head in 16 bits; rows of one prompt find its part in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.log_probs import LOWEST, _tanh

# (nodes of one tile, warps).
TILE = (64, 4)


# One program takes one row and one key head, whose query heads (padded to BLOCK_H) share every tile of its
# path: scores, running maximum and sum, and the weighted values. Grid (rows, key heads). Writes (n, H, d).
@triton.jit
def _path_attention_fwd_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    path_ptr,
    length_ptr,
    out_ptr,
    stride_query_n,
    stride_query_h,
    stride_path,
    num_heads,
    num_kv_heads,
    window,
    pre_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    heads = tl.arange(0, BLOCK_H)
    depth = tl.arange(0, BLOCK_D)
    nodes = tl.arange(0, BLOCK_N)
    in_group, in_width = heads < GROUP, depth < WIDTH
    own = in_group[:, None] & in_width[None, :]
    offsets = row * stride_query_n + (kv_head * GROUP + heads)[:, None] * stride_query_h + depth[None, :]
    q = tl.load(query_ptr + offsets, mask=own, other=0.0)
    length = tl.load(length_ptr + row).to(tl.int32)
    start = tl.maximum(length - window, 0)
    peak = tl.full((BLOCK_H,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    while start < length:
        is_node = start + nodes < length
        node = tl.load(path_ptr + row * stride_path + start + nodes, mask=is_node, other=0).to(tl.int64)
        at = (node * num_kv_heads + kv_head)[:, None] * WIDTH + depth[None, :]
        read = is_node[:, None] & in_width[None, :]
        k = tl.load(keys_ptr + at, mask=read, other=0.0)
        v = tl.load(values_ptr + at, mask=read, other=0.0)
        if IS_INTERPRETED:
            # The interpreter would multiply the bits of bfloat16.
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * pre_scale
        if HAS_SOFTCAP:
            scores = _tanh(scores)[0] * softcap
        scores = tl.where(is_node[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        peak = higher
        start += BLOCK_N
    out_offsets = (row * num_heads + kv_head * GROUP + heads)[:, None] * WIDTH + depth[None, :]
    tl.store(out_ptr + out_offsets, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)


IS_INTERPRETED = not isinstance(_path_attention_fwd_kernel, triton.JITFunction)


def path_attention(
    query: Tensor,  # (n, H, d) float32 | bfloat16 | float16, contiguous in d
    keys: Tensor,  # (C, Hkv, d) contiguous
    values: Tensor,  # (C, Hkv, d) contiguous
    path: Tensor,  # (n, W) int32, contiguous rows
    length: Tensor,  # (n,) int64
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: none
) -> Tensor:
    """(n, H, d); paths are not checked."""
    (num_rows, heads, width), kv_heads = query.shape, keys.shape[1]
    # The interpreter cuts bfloat16 off where a GPU rounds.
    dtype = torch.float32 if IS_INTERPRETED else query.dtype
    out = torch.empty(num_rows, heads, width, dtype=dtype, device=query.device)
    if out.numel():
        block_n, num_warps = TILE
        with torch.cuda.device_of(query):
            _path_attention_fwd_kernel[(num_rows, kv_heads)](
                query,
                keys,
                values,
                path,
                length,
                out,
                query.stride(0),
                query.stride(1),
                path.stride(0),
                heads,
                kv_heads,
                window if window > 0 else path.shape[1],
                scale / softcap if softcap else scale,
                softcap,
                HAS_SOFTCAP=softcap != 0,
                IS_INTERPRETED=IS_INTERPRETED,
                PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
                GROUP=heads // kv_heads,
                WIDTH=width,
                BLOCK_H=max(16, triton.next_power_of_2(heads // kv_heads)),
                BLOCK_D=max(16, triton.next_power_of_2(width)),
                BLOCK_N=block_n,
                num_warps=num_warps,
            )
    return out.to(query.dtype)
