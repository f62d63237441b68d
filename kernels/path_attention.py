"""Attention of decoded tokens over their paths in a pool of keys and values.

Equation: fastgfn/reference/attention.py. Alone, a row reads its whole path, P nodes of the prompt and L of
its own, 4 d bytes per node and key head in 16 bits; rows of one prompt find its part in L2. With a table of
tiles of up to R rows of one prompt, a first kernel reads the prompt once per tile, P / R + L nodes per row in
all, and the second starts from its sums: d + 2 float32 per row, query head and split of the prompt, written
and read, as many bytes as 2 GROUP (d + 2) / d nodes per split. Below 32 nodes the sums of two rows cost what
they save.

Predicted for P = 200, L = 30 and 256 rows of 8 key heads of 64 (of 128), GROUP 4, on an H200: 120 (240) MB
from L2 at 5.5 TB/s, 22 (44) us, against 16 (31) MB of own nodes from memory, 4 (7) us, and 15 (30) MB of
prompt and sums from L2, 3 (5) us, with a chain of two tiles of nodes, 3 us, and one more launch, 1 us: 2 to 3
times as fast.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.log_probs import LOWEST, _tanh

# (nodes of one tile, warps).
TILE = (64, 4)
# For tiles of rows, by bytes of an element and largest head: lines (query heads x rows) of a program, nodes,
# warps and stages. Fewer lines have one warpgroup. Wider heads would spill: rows read their prompt alone.
SHARED_TILES = {
    2: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
    4: {64: (32, 32, 4, 2), 128: (32, 32, 4, 1)},
}
# Programs that the splits of long prompts should make, two for each of the multiprocessors of an H200.
PROGRAMS = 264
MOST_SPLITS = 16


@triton.jit
def _nodes_in_split(depth, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(depth, NUM_SPLITS * BLOCK_N) * BLOCK_N


@triton.jit
def _attend(
    q, k, v, seen, peak, total, out, pre_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, IS_INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and weighted values (M, BLOCK_D) after some more nodes, of which `seen` (M, N) count."""
    if IS_INTERPRETED:
        # The interpreter would multiply the bits of bfloat16.
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * pre_scale
    if HAS_SOFTCAP:
        scores = _tanh(scores)[0] * softcap
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return higher, total, out


# One program takes one key head, some rows of a tile and one split of their prompt, which it reads once; line
# m is query head m % BLOCK_G of row m // BLOCK_G. Grid (key heads, splits, tiles x blocks of rows), where
# empty ones end at once. Writes weighted values (splits, n, H, d), maxima and sums (splits, n, H).
@triton.jit
def _shared_prompts_fwd_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    path_ptr,
    length_ptr,
    tiles_ptr,
    depth_ptr,
    parts_ptr,
    peaks_ptr,
    totals_ptr,
    stride_query_n,
    stride_query_h,
    stride_path,
    num_rows,
    num_heads,
    num_kv_heads,
    window,
    pre_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks_of_tile: tl.constexpr = (TILE_ROWS + BLOCK_R - 1) // BLOCK_R
    tile_ptr = tiles_ptr + block // blocks_of_tile * TILE_ROWS
    column = block % blocks_of_tile * BLOCK_R
    # The rows of a tile are its first columns.
    first = tl.load(tile_ptr).to(tl.int64)
    if tl.load(tile_ptr + column) < 0:
        return
    depth = tl.load(depth_ptr + first).to(tl.int32)
    size = _nodes_in_split(depth, NUM_SPLITS, BLOCK_N)
    start, stop = split * size, tl.minimum(split * size + size, depth)
    if start >= stop:
        return
    lines = tl.arange(0, BLOCK_R * BLOCK_G)
    width, nodes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    columns, heads = column + lines // BLOCK_G, lines % BLOCK_G
    in_width = width < WIDTH
    row = tl.load(tile_ptr + columns, mask=columns < TILE_ROWS, other=-1).to(tl.int64)
    is_line = (row >= 0) & (heads < GROUP)
    own = is_line[:, None] & in_width[None, :]
    head = kv_head * GROUP + heads
    offsets = row[:, None] * stride_query_n + head[:, None] * stride_query_h + width[None, :]
    q = tl.load(query_ptr + offsets, mask=own, other=0.0)
    if HAS_WINDOW:
        lowest = tl.load(length_ptr + row, mask=is_line, other=2**30).to(tl.int32) - window
        start = tl.maximum(start, tl.minimum(tl.min(lowest, axis=0), stop))
    peak = tl.full((BLOCK_R * BLOCK_G,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R * BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_R * BLOCK_G, BLOCK_D), tl.float32)
    for begin in range(start, stop, BLOCK_N):
        place = begin + nodes
        is_node = place < stop
        node = tl.load(path_ptr + first * stride_path + place, mask=is_node, other=0).to(tl.int64)
        at = (node * num_kv_heads + kv_head)[:, None] * WIDTH + width[None, :]
        read = is_node[:, None] & in_width[None, :]
        k = tl.load(keys_ptr + at, mask=read, other=0.0)
        v = tl.load(values_ptr + at, mask=read, other=0.0)
        seen = is_node[None, :]
        if HAS_WINDOW:
            seen = seen & (place[None, :] >= lowest[:, None])
        peak, total, out = _attend(
            q, k, v, seen, peak, total, out, pre_scale, softcap, HAS_SOFTCAP, IS_INTERPRETED, PRECISION
        )
    at_line = (split * num_rows + row) * num_heads + head
    tl.store(peaks_ptr + at_line, peak, mask=is_line)
    tl.store(totals_ptr + at_line, total, mask=is_line)
    tl.store(parts_ptr + at_line[:, None] * WIDTH + width[None, :], out, mask=own)


# One program takes one row and one key head, whose query heads (padded to BLOCK_H) share every tile of its
# path: scores, running maximum and sum, and the weighted values, which start from those of the part that the
# row shares, if any. Grid (rows, key heads). Writes (n, H, d).
@triton.jit
def _path_attention_fwd_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    path_ptr,
    length_ptr,
    depth_ptr,
    parts_ptr,
    peaks_ptr,
    totals_ptr,
    out_ptr,
    stride_query_n,
    stride_query_h,
    stride_path,
    num_rows,
    num_heads,
    num_kv_heads,
    window,
    pre_scale,
    softcap,
    HAS_SHARED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SHARED_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    heads = tl.arange(0, BLOCK_H)
    width = tl.arange(0, BLOCK_D)
    nodes = tl.arange(0, BLOCK_N)
    in_group, in_width = heads < GROUP, width < WIDTH
    own = in_group[:, None] & in_width[None, :]
    head = kv_head * GROUP + heads
    offsets = row * stride_query_n + head[:, None] * stride_query_h + width[None, :]
    q = tl.load(query_ptr + offsets, mask=own, other=0.0)
    length = tl.load(length_ptr + row).to(tl.int32)
    start = tl.maximum(length - window, 0)
    peak = tl.full((BLOCK_H,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    if HAS_SHARED:
        depth = tl.load(depth_ptr + row).to(tl.int32)
        start = tl.maximum(start, depth)
        used = tl.cdiv(depth, tl.maximum(_nodes_in_split(depth, NUM_SPLITS, SHARED_N), 1))
        for split in range(0, used):
            at_line = (split * num_rows + row) * num_heads + head
            part_peak = tl.load(peaks_ptr + at_line, mask=in_group, other=LOWEST)
            part_total = tl.load(totals_ptr + at_line, mask=in_group, other=0.0)
            part = tl.load(parts_ptr + at_line[:, None] * WIDTH + width[None, :], mask=own, other=0.0)
            higher = tl.maximum(peak, part_peak)
            shrink, part_shrink = tl.exp(peak - higher), tl.exp(part_peak - higher)
            total = total * shrink + part_total * part_shrink
            out = out * shrink[:, None] + part * part_shrink[:, None]
            peak = higher
    while start < length:
        is_node = start + nodes < length
        node = tl.load(path_ptr + row * stride_path + start + nodes, mask=is_node, other=0).to(tl.int64)
        at = (node * num_kv_heads + kv_head)[:, None] * WIDTH + width[None, :]
        read = is_node[:, None] & in_width[None, :]
        k = tl.load(keys_ptr + at, mask=read, other=0.0)
        v = tl.load(values_ptr + at, mask=read, other=0.0)
        seen = is_node[None, :]
        peak, total, out = _attend(
            q, k, v, seen, peak, total, out, pre_scale, softcap, HAS_SOFTCAP, IS_INTERPRETED, PRECISION
        )
        start += BLOCK_N
    out_offsets = (row * num_heads + head)[:, None] * WIDTH + width[None, :]
    tl.store(out_ptr + out_offsets, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)


IS_INTERPRETED = not isinstance(_path_attention_fwd_kernel, triton.JITFunction)


def shared_constants(
    num_rows: int, tile_rows: int, kv_heads: int, group: int, width: int, path: int, itemsize: int
) -> dict[str, int]:
    """Constants and launch options of the first kernel, from shapes: its splits fill the device."""
    block_d, block_g = max(16, triton.next_power_of_2(width)), triton.next_power_of_2(group)
    blocks = next(blocks for widest, blocks in SHARED_TILES[itemsize].items() if width <= widest)
    lines, block_n, num_warps, num_stages = blocks
    block_r = min(triton.next_power_of_2(tile_rows), max(1, lines // block_g))
    block_r = max(block_r, triton.cdiv(16, block_g))
    programs = triton.cdiv(num_rows, min(block_r, tile_rows)) * kv_heads
    splits = max(1, min(MOST_SPLITS, path // block_n, PROGRAMS // programs))
    return {
        "GROUP": group,
        "WIDTH": width,
        "TILE_ROWS": tile_rows,
        "NUM_SPLITS": splits,
        "BLOCK_R": block_r,
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_warps": num_warps if block_r * block_g >= lines else 4,
        "num_stages": num_stages,
    }


def own_tile(group: int, width: int, itemsize: int) -> tuple[int, int]:
    """TILE of what is left of a path, which is short: few warps leave room for many rows on a multiprocessor,
    12 and not 7 of heads of 64 on sm_90, 6 and not 4 of 128."""
    if itemsize > 2:
        return 16, 4
    few = 1 if width <= 64 else 2
    return 32, few if group <= 16 and width <= 128 else 4


def path_attention(
    query: Tensor,  # (n, H, d) float32 | bfloat16 | float16, contiguous in d
    keys: Tensor,  # (C, Hkv, d) contiguous
    values: Tensor,  # (C, Hkv, d) contiguous
    path: Tensor,  # (n, W) int32, contiguous rows
    length: Tensor,  # (n,) int64
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: none
    tiles: Tensor | None = None,  # (T, R) int32 contiguous, rows of one prompt, then -1
    depth: Tensor | None = None,  # (n,) int64, nodes that a row shares with its tile, 0 without one
) -> Tensor:
    """(n, H, d); paths and tiles are not checked."""
    (num_rows, heads, width), kv_heads = query.shape, keys.shape[1]
    group = heads // kv_heads
    # The interpreter cuts bfloat16 off where a GPU rounds.
    dtype = torch.float32 if IS_INTERPRETED else query.dtype
    out = torch.empty(num_rows, heads, width, dtype=dtype, device=query.device)
    if not out.numel():
        return out.to(query.dtype)
    inputs = query, keys, values, path, length
    sizes = query.stride(0), query.stride(1), path.stride(0), num_rows, heads, kv_heads
    sizes += window if window > 0 else path.shape[1], scale / softcap if softcap else scale, softcap
    options = {
        "HAS_SOFTCAP": softcap != 0,
        "IS_INTERPRETED": IS_INTERPRETED,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "GROUP": group,
        "WIDTH": width,
    }
    is_shared = tiles is not None and len(tiles) > 0 and width <= max(SHARED_TILES[query.element_size()])
    sums, splits, shared_n = (None, None, None), 1, 1
    with torch.cuda.device_of(query):
        if is_shared:
            sums, splits, shared_n = _shared_sums(inputs, sizes, tiles, depth, window > 0, options)
        block_n, num_warps = own_tile(group, width, query.element_size()) if is_shared else TILE
        _path_attention_fwd_kernel[(num_rows, kv_heads)](
            *inputs,
            depth if is_shared else None,
            *sums,
            out,
            *sizes,
            HAS_SHARED=is_shared,
            **options,
            NUM_SPLITS=splits,
            SHARED_N=shared_n,
            BLOCK_H=max(16, triton.next_power_of_2(group)),
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return out.to(query.dtype)


def _shared_sums(
    inputs: tuple, sizes: tuple, tiles: Tensor, depth: Tensor, has_window: bool, options: dict
) -> tuple[tuple[Tensor, ...], int, int]:
    """Weighted values, maxima and sums of the shared nodes, their number of splits and of nodes in a tile."""
    query, keys, _, path, _ = inputs
    num_rows, heads, width = query.shape
    kv_heads, tile_rows = keys.shape[1], tiles.shape[1]
    constants = shared_constants(
        num_rows, tile_rows, kv_heads, heads // kv_heads, width, path.shape[1], query.element_size()
    )
    splits, block_r, block_n = (constants[name] for name in ("NUM_SPLITS", "BLOCK_R", "BLOCK_N"))
    shapes = (splits, num_rows, heads, width), (splits, num_rows, heads), (splits, num_rows, heads)
    sums = tuple(torch.empty(shape, dtype=torch.float32, device=query.device) for shape in shapes)
    _shared_prompts_fwd_kernel[(kv_heads, splits, len(tiles) * triton.cdiv(tile_rows, block_r))](
        *inputs, tiles, depth, *sums, *sizes, HAS_WINDOW=has_window, **options | constants
    )
    return sums, splits, block_n
