"""The fused forward of the head: lse of hidden W^T without anything of size V in memory.

2 R V D FLOP; W is read from memory once and from L2 once per row block. Expected at R = 4096, V = 128256,
D = 2048: 2.7 ms at 790 TFLOP/s, plus about a tenth for the epilogue of a tile, which nothing overlaps (32768
exponentials take 2048 clocks of a multiprocessor beside 32768 for the products; a third at D = 576).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.head import IS_INTERPRETED, _flags
from fastgfn.kernels.log_probs import LOWEST, _scales, _tanh

# Tile of rows, vocabulary and width, warps, stages. WIDE needs half as much of L2's bandwidth per product as
# LARGE; its 128 accumulators per thread leave no registers for the softcap, for a mask on sm_100 and for the
# operands on sm_80. On sm_100 LARGE has none for a bias, a mask or the softcap either.
WIDE = (128, 256, 64, 8, 3)
LARGE = (128, 128, 64, 8, 4)
SMALL = (64, 128, 64, 4, 4)
SINGLE = (64, 64, 32, 4, 3)
# Most vocabulary splits of a row block: each writes 8 bytes per row.
MAX_SPLITS = 128


# One program takes BLOCK_R rows of one mask and one split of the vocabulary: tile by tile the logits hidden
# W^T in registers, then scale, bias, softcap, mask and temperature, and a running maximum and sum per row.
# Grid (splits * row blocks,), row blocks fastest: they share a tile of W in L2. Writes (2, splits, rows).
@triton.jit(do_not_specialize=["num_policy"])
def _fused_parts_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    parts_ptr,
    num_rows,
    num_policy,
    num_blocks,
    num_splits,
    vocab,
    stride_hidden_r,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    pre_scale,
    post_scale,
    mask_scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    policy_blocks = tl.cdiv(num_policy, BLOCK_R)
    is_policy = block < policy_blocks
    first_row = tl.where(is_policy, block * BLOCK_R, num_policy + (block - policy_blocks) * BLOCK_R)
    end_row = tl.where(is_policy, num_policy, num_rows)
    mask_row = mask_ptr + tl.where(is_policy, 0, vocab)
    rows = first_row + tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end read the last one.
    row_offsets = tl.minimum(rows, end_row - 1).to(tl.int64) * stride_hidden_r
    hidden_start = hidden_ptr + row_offsets[:, None] + depth[None, :] * stride_hidden_d
    peak = tl.full((BLOCK_R,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    num_tiles = tl.cdiv(vocab, BLOCK_V)
    per_split = tl.cdiv(num_tiles, num_splits)
    tile = split * per_split
    last = tl.minimum(tile + per_split, num_tiles)
    while tile < last:
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        safe = tl.minimum(columns, vocab - 1)
        hidden_ptrs = hidden_start
        weight_ptrs = (
            weight_ptr + safe.to(tl.int64)[None, :] * stride_weight_v + depth[:, None] * stride_weight_d
        )
        x = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            if IS_EVEN:
                h = tl.load(hidden_ptrs)
                w = tl.load(weight_ptrs)
            else:
                h = tl.load(hidden_ptrs, mask=(depth < WIDTH - start)[None, :], other=0.0)
                w = tl.load(weight_ptrs, mask=(depth < WIDTH - start)[:, None], other=0.0)
            if IS_INTERPRETED:
                # The interpreter would multiply the bits of bfloat16.
                h, w = h.to(tl.float32), w.to(tl.float32)
            x = tl.dot(h, w, x, input_precision=PRECISION)
            hidden_ptrs += BLOCK_D * stride_hidden_d
            weight_ptrs += BLOCK_D * stride_weight_d
        bias = tl.zeros((BLOCK_V,), tl.float32)
        extra = tl.zeros((BLOCK_V,), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + safe).to(tl.float32)
        if HAS_MASK:
            extra = tl.load(mask_row + safe) * mask_scale
        if HAS_SOFTCAP:
            z, _ = _tanh((x + bias[None, :]) * pre_scale)
            z = z * post_scale + extra[None, :]
        elif HAS_BIAS or HAS_MASK:
            z = x * pre_scale + (bias * pre_scale + extra)[None, :]
        else:
            z = x * pre_scale
        z = tl.where((columns < vocab)[None, :], z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        peak = higher
        tile += 1
    in_rows = rows < end_row
    tl.store(parts_ptr + split * num_rows + rows, peak, mask=in_rows)
    tl.store(parts_ptr + (num_splits + split) * num_rows + rows, total, mask=in_rows)


def num_splits(num_blocks: int, num_tiles: int, num_programs: int) -> int:
    """Vocabulary splits per row block that end first on a machine that runs num_programs at once."""

    def tiles_in_sequence(splits: int) -> int:
        # A program's start and end cost about one tile.
        return triton.cdiv(num_blocks * splits, num_programs) * (triton.cdiv(num_tiles, splits) + 1)

    return min(range(1, min(num_tiles, MAX_SPLITS) + 1), key=tiles_in_sequence)


def tile(hidden: Tensor, flags: dict[str, bool]) -> tuple[int, int, int, int, int]:
    if hidden.element_size() == 4:
        return SINGLE
    if hidden.shape[0] <= 64:
        return SMALL
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    if capability < (9, 0):
        return LARGE
    if capability < (10, 0):
        return LARGE if flags["HAS_SOFTCAP"] else WIDE
    return SMALL if any(flags.values()) else WIDE


def fused_parts(
    hidden: Tensor,  # (R, D) float32 | bfloat16 | float16, any strides
    weight: Tensor,  # (V, D) same dtype, any strides
    bias: Tensor | None,
    masks: Tensor | None,
    num_policy: int,
    scales: tuple[float, float | None, float],
    num_programs: int,
) -> Tensor:
    """The two parts of lse, (2, R) float32: the maximum and log of the sum above it. Nothing is (R, V)."""
    (num_rows, width), vocab = hidden.shape, weight.shape[0]
    flags = _flags(bias, masks, scales[1])
    block_r, block_v, block_d, num_warps, num_stages = tile(hidden, flags)
    # A block has one mask, so that the two streams do not share one.
    num_policy = num_policy if flags.pop("HAS_TWO_MASKS") else num_rows
    num_blocks = triton.cdiv(num_policy, block_r) + triton.cdiv(num_rows - num_policy, block_r)
    splits = num_splits(num_blocks, triton.cdiv(vocab, block_v), num_programs)
    parts = torch.empty(2, splits, num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        with torch.cuda.device_of(hidden):
            _fused_parts_fwd_kernel[(num_blocks * splits,)](
                hidden,
                weight,
                weight if bias is None else bias,
                parts if masks is None else masks,
                parts,
                num_rows,
                num_policy,
                num_blocks,
                splits,
                vocab,
                *hidden.stride(),
                *weight.stride(),
                *_scales(*scales),
                **flags,
                IS_EVEN=width % block_d == 0,
                IS_INTERPRETED=IS_INTERPRETED,
                PRECISION="tf32x3" if hidden.dtype == torch.float32 else "ieee",
                WIDTH=width,
                BLOCK_R=block_r,
                BLOCK_V=block_v,
                BLOCK_D=block_d,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    peaks, totals = parts
    peak = peaks.amax(0)
    return torch.stack([peak, (totals * (peaks - peak).exp_()).sum(0).log_()])
