"""Attention over one packed token tree, forward (backward: tree_attention_backward.py).

Node i sees node j exactly when j <= i < end[j] and, with a window, position[i] - position[j] < window. Pairs
of blocks without a visible pair of nodes are not read: a plan, made once per mask by
`fastgfn.ops.attention.TreeMask`, lists for every block those that it meets. A row of a plan holds the number
of blocks seen in full, the number of blocks seen, and the indices, full ones first. A loop over that list
keeps the loads of the next blocks in flight; a test inside a loop over all blocks would forbid that.

A NaN or an infinity reaches exactly the nodes that see it: the nodes that hold one are found first, and a
block under a mask reads them as 0, so that no weight of 0 meets a NaN in a product.

Prediction, bf16, 8 heads of 128 over one prompt of 200 and 256 samples of 30 (T = 7880): each 128-row block
meets 4 key blocks of the prompt and 3 of its own, so 62 x 8 programs do 7 x 4 x 128 x 64 x 128 FLOPs = 15
GFLOP against 127 for the causal triangle; 0.04 ms at half the speed of a plain causal kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; the interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to dtype, to the nearest; the interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def cap(x):
    """tanh and its derivative; the series avoids the cancellation of 1 - exp(-2|x|) near 0."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 - q * (17.0 / 315.0))))
    value = tl.where(q < 0.04, near, tl.where(x < 0, -far, far))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def tile(ptr, stride, inside, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) from the row at ptr on; zero off the rows `inside` (None: all) and past HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)[None]
    at = ptr + tl.arange(0, ROWS)[:, None] * stride + columns
    if inside is not None:
        x = tl.load(at, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(at, mask=columns < HEAD_DIM, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def sees(i, j, end, lowest, position, HAS_WINDOW: tl.constexpr):
    """Whether node i sees node j; end and position are node j's, lowest is position[i] - window."""
    visible = (j <= i) & (i < end)
    if HAS_WINDOW:
        visible = visible & (position > lowest)
    return visible


# One program reads one block of keys and values. Grid (blocks of nodes, Hkv).
# Writes faults (2, Hkv, T) float32: 0 where all of a key (then of a value) is finite, else NaN.
@triton.jit
def _tree_attention_faults_kernel(
    key_ptr,
    value_ptr,
    faults_ptr,
    stride_key_h,
    stride_key_t,
    stride_value_h,
    stride_value_t,
    size,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = first + rows < size
    k = tile(
        key_ptr + head * stride_key_h + first * stride_key_t, stride_key_t, inside, BLOCK, HEAD_DIM, BLOCK_D
    )
    at = value_ptr + head * stride_value_h + first * stride_value_t
    v = tile(at, stride_value_t, inside, BLOCK, HEAD_DIM, BLOCK_D)
    faults_ptr += head * size + first + rows
    tl.store(faults_ptr, tl.sum(k.to(tl.float32) * 0.0, axis=1), mask=inside)
    faults_ptr += tl.num_programs(1).to(tl.int64) * size
    tl.store(faults_ptr, tl.sum(v.to(tl.float32) * 0.0, axis=1), mask=inside)


@triton.jit
def _attend(
    q, k, v, fault, visible, peak, total, acc, pre_scale, post_scale,
    HAS_SOFTCAP: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax; `peak` is in units of post_scale, before it is applied."""
    z = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if HAS_SOFTCAP:
        z, _ = cap(z * pre_scale)
    if not IS_FULL:
        z = tl.where(visible, z + fault[None], float("-inf"))
    higher = tl.maximum(peak, tl.max(z, axis=1))
    base = higher
    if not IS_FULL:
        # a row that has seen nothing yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(z * post_scale - (base * post_scale)[:, None])
    decay = tl.exp2((peak - base) * post_scale)
    acc = dot(narrow(p, v.dtype), v, acc * decay[:, None])
    return higher, total * decay + tl.sum(p, axis=1), acc


# One program attends one block of rows of one head to the key blocks of its plan, those seen in full first.
# Grid (blocks of queries, H), the last rows first because they see most.
# Writes out in the dtype of query, and lse (H, T) float32 in nats.
@triton.jit
def _tree_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    end_ptr,
    position_ptr,
    plan_ptr,
    faults_ptr,
    out_ptr,
    lse_ptr,
    stride_query_h,
    stride_query_t,
    stride_key_h,
    stride_key_t,
    stride_value_h,
    stride_value_t,
    stride_out_h,
    stride_out_t,
    stride_plan,
    size,
    repeat,
    window,
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
    key_ptr += head // repeat * stride_key_h
    value_ptr += head // repeat * stride_value_h
    plan_ptr += block * stride_plan
    faults_ptr += (tl.num_programs(1) // repeat + head // repeat) * size
    num_full = tl.load(plan_ptr)
    num_seen = tl.load(plan_ptr + 1)

    q = tile(query_ptr, stride_query_t, i < size, BLOCK_Q, HEAD_DIM, BLOCK_D)
    lowest = i
    if HAS_WINDOW:
        lowest = tl.load(position_ptr + i, mask=i < size, other=0) - window
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for n in range(num_full):
        start = tl.load(plan_ptr + 2 + n).to(tl.int64) * BLOCK_K
        k = tile(key_ptr + start * stride_key_t, stride_key_t, None, BLOCK_K, HEAD_DIM, BLOCK_D)
        v = tile(value_ptr + start * stride_value_t, stride_value_t, None, BLOCK_K, HEAD_DIM, BLOCK_D)
        peak, total, acc = _attend(
            q, k, v, None, None, peak, total, acc, pre_scale, post_scale, HAS_SOFTCAP, True
        )
    for n in range(num_full, num_seen):
        start = tl.load(plan_ptr + 2 + n).to(tl.int64) * BLOCK_K
        j = start.to(tl.int32) + tl.arange(0, BLOCK_K)
        end = tl.load(end_ptr + j, mask=j < size, other=0)
        # a value with a NaN is read as 0, which is harmless where it is invisible, and its fault as NaN
        fault = tl.load(faults_ptr + j, mask=j < size, other=0.0)
        k = tile(key_ptr + start * stride_key_t, stride_key_t, j < size, BLOCK_K, HEAD_DIM, BLOCK_D)
        inside = (j < size) & (fault == 0.0)
        v = tile(value_ptr + start * stride_value_t, stride_value_t, inside, BLOCK_K, HEAD_DIM, BLOCK_D)
        position = end
        if HAS_WINDOW:
            position = tl.load(position_ptr + j, mask=j < size, other=0)
        visible = sees(i[:, None], j[None], end[None], lowest[:, None], position[None], HAS_WINDOW)
        peak, total, acc = _attend(
            q, k, v, fault, visible, peak, total, acc, pre_scale, post_scale, HAS_SOFTCAP, False
        )

    tl.store(lse_ptr + head * size + i, peak * (post_scale / LOG2E) + tl.log(total), mask=i < size)
    columns = tl.arange(0, BLOCK_D)[None]
    rows = tl.arange(0, BLOCK_Q)[:, None]
    out_ptr += head * stride_out_h + first * stride_out_t
    out = narrow(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * stride_out_t + columns, out, mask=(first + rows < size) & (columns < HEAD_DIM))


IS_INTERPRETED = not isinstance(_tree_attention_fwd_kernel, triton.JITFunction)
MAX_HEAD_DIM = 256
BLOCK_ROWS = 32


class Blocks(NamedTuple):
    """Rows of queries and of keys per block, and the launch options."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Table(NamedTuple):
    """The blocks of the three kernels."""

    fwd: Blocks
    grad_kv: Blocks
    grad_q: Blocks


# By the padded head dim. The largest blocks that spill nothing under every supported compiler; the second
# tables are those for a softcap or a window, which need more registers.
AMPERE = {
    64: Table(Blocks(128, 64, 8, 3), Blocks(32, 64, 4, 3), Blocks(128, 64, 8, 3)),
    128: Table(Blocks(128, 32, 8, 3), Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2)),
    256: Table(Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 2)),
}
HOPPER = {
    64: Table(Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 3)),
    128: Table(Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 2)),
    256: Table(Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
}
HOPPER_OPTIONS = {
    64: HOPPER[64]._replace(grad_kv=Blocks(32, 64, 8, 2)),
    128: Table(Blocks(128, 64, 8, 3), Blocks(32, 64, 8, 2), Blocks(128, 32, 8, 2)),
    256: HOPPER[256]._replace(grad_q=Blocks(64, 16, 8, 2)),
}
BLACKWELL = {
    64: HOPPER[64]._replace(grad_q=Blocks(64, 64, 8, 2)),
    128: Table(Blocks(128, 32, 8, 3), Blocks(32, 64, 8, 2), Blocks(128, 32, 8, 2)),
    256: HOPPER[256],
}
BLACKWELL_OPTIONS = BLACKWELL | {
    256: Table(Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
}
# Workstation cards of any generation have 99 KB of shared memory for a program.
WORKSTATION = {
    64: Table(Blocks(128, 64, 8, 3), Blocks(32, 64, 8, 2), Blocks(64, 32, 4, 2)),
    128: AMPERE[128],
    256: Table(Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(64, 16, 8, 2)),
}
WORKSTATION_BYTES = 99 * 1024
# by compute capability: without and with options
TABLES = {
    80: (AMPERE, AMPERE),
    89: (WORKSTATION, WORKSTATION),
    90: (HOPPER, HOPPER_OPTIONS),
    100: (BLACKWELL, BLACKWELL_OPTIONS),
    120: (WORKSTATION, WORKSTATION),
}
# float32 without tensor cores, for tests and debugging
SINGLE = {
    64: Table(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: Table(Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    256: Table(Blocks(16, 16, 4, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}


def table(query: Tensor, softcap: float | None, window: int | None) -> Table:
    """Block sizes for a head dim of at most MAX_HEAD_DIM."""
    width = max(64, triton.next_power_of_2(query.shape[2]))
    if query.dtype == torch.float32:
        return SINGLE[width]
    kind = 90
    if query.is_cuda:
        card = torch.cuda.get_device_properties(query.device)
        is_small = card.shared_memory_per_block_optin <= WORKSTATION_BYTES
        kind = 89 if is_small else max(80, min(10 * card.major, 100))
    return TABLES[kind][softcap is not None or window is not None][width]


def scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """(before tanh, after it): the scores in units of log 2 are post * tanh(pre * q k), or post * q k."""
    if softcap is None:
        return 1.0, scale * LOG2E.value
    return scale / softcap, softcap * LOG2E.value


def constants(query: Tensor, blocks: Blocks, softcap: float | None, window: int | None) -> dict:
    """What is known at compile time, and the launch options."""
    return {
        "HEAD_DIM": query.shape[2],
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def find_faults(key: Tensor, value: Tensor) -> Tensor:
    """(2, Hkv, T) float32: NaN where a key (then a value) holds a NaN or an infinity, else 0."""
    heads, size, width = key.shape
    faults = key.new_empty(2, heads, size, dtype=torch.float32)
    _tree_attention_faults_kernel[(triton.cdiv(size, BLOCK_ROWS), heads)](
        key,
        value,
        faults,
        *key.stride()[:2],
        *value.stride()[:2],
        size,
        HEAD_DIM=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK=BLOCK_ROWS,
    )
    return faults


def tree_attention_fwd(
    query: Tensor,  # (H, T, d) last stride 1
    key: Tensor,  # (Hkv, T, d) last stride 1
    value: Tensor,  # (Hkv, T, d) last stride 1
    end: Tensor,  # (T,) int32
    position: Tensor,  # (T,) int32
    plan: Tensor,  # (blocks of queries, 2 + blocks of keys) int32, contiguous
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out (H, T, d), a view of (T, H, d), in the dtype of query; lse (H, T) float32 in nats."""
    heads, size, width = query.shape
    out = query.new_empty(size, heads, width).transpose(0, 1)
    lse = query.new_empty(heads, size, dtype=torch.float32)
    blocks = table(query, softcap, window).fwd
    if size:
        with torch.cuda.device_of(query):
            _tree_attention_fwd_kernel[(plan.shape[0], heads)](
                query,
                key,
                value,
                end,
                position,
                plan,
                find_faults(key, value),
                out,
                lse,
                *(s for x in (query, key, value, out) for s in x.stride()[:2]),
                plan.stride(0),
                size,
                heads // key.shape[0],
                0 if window is None else window,
                *scales(scale, softcap),
                **constants(query, blocks, softcap, window),
            )
    return out, lse
