"""Next-token draws from hidden states and a head, in one pass over the weight: no logits are written.

Partial results and noise are those of sample_next.py, in the epilogue of the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.log_probs import _tanh
from fastgfn.kernels.sample_next import LOWEST, _noise, combine_draws, draw_partials

# Draws up to -> BLOCK_M, BLOCK_V, BLOCK_D, warps, stages, by bytes per element. Larger tiles spill: the
# epilogue needs about six registers for each of a thread's logits, 32 here.
HEAD_BLOCKS = {
    2: (
        (16, (16, 64, 128, 4, 4)),
        (32, (32, 128, 64, 4, 4)),
        (None, (64, 128, 32, 8, 4)),
    ),
    4: ((16, (16, 64, 64, 4, 4)), (None, (32, 64, 32, 4, 4))),
}
# One program streams the weight while the other draws.
PROGRAMS_PER_SM = 2
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _absorb(
    z, start, stop, barred, is_row, is_tempered, inverse, trajectory, position, seed, vocab,
    peak, total, tempered, best, token, z_token, z_stop,
):  # fmt: skip
    """The running results of each draw after its logits z (BLOCK_M, W) of the tokens from `start` on."""
    lanes = tl.arange(0, z.shape[1])
    columns = (start + lanes)[None, :]
    z = tl.where((columns < vocab) & (columns != barred[:, None]) & is_row[:, None], z, float("-inf"))
    higher = tl.maximum(peak, tl.max(z, axis=1))
    total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
    if is_tempered:
        grown = tl.sum(tl.exp((z - higher[:, None]) * inverse[:, None]), axis=1)
        tempered = tempered * tl.exp((peak - higher) * inverse) + grown
    if (stop >= start) & (stop < start + z.shape[1]):
        z_stop = tl.max(tl.where(columns == stop, z, float("-inf")), axis=1)
    blocks = (start // 4 + tl.arange(0, z.shape[1] // 4))[None, :]
    score = z * inverse[:, None] + _noise(blocks, position, trajectory, seed)
    top, lane = tl.max(score, axis=1, return_indices=True)
    z_top = tl.max(tl.where(lanes[None, :] == lane[:, None], z, float("-inf")), axis=1)
    is_better = top > best
    token = tl.where(is_better, start + lane, token)
    z_token = tl.where(is_better, z_top, z_token)
    return higher, total, tempered, tl.maximum(best, top), token, z_token, z_stop


# One program takes BLOCK_M draws and TILES tiles of the vocabulary, whose logits stay in registers.
# Grid (cdiv(K, BLOCK_M), splits): programs that read the same tiles run side by side.
# Writes the partials and tokens of sample_next.py.
@triton.jit(do_not_specialize=["num_rows", "num_draws", "stop"])
def _fused_draw_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    logit_bias_ptr,
    rows_ptr,
    temperature_ptr,
    trajectory_ptr,
    position_ptr,
    seed_ptr,
    forbid_ptr,
    partials_ptr,
    tokens_ptr,
    num_rows,
    num_draws,
    vocab,
    stop,
    stride_h_r,
    stride_h_d,
    stride_w_v,
    stride_w_d,
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_LOGIT_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    draws = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    is_draw = draws < num_draws
    row = tl.load(rows_ptr + draws, mask=is_draw, other=-1)
    position = tl.load(position_ptr + draws, mask=is_draw, other=0)
    # As in sample_next.py; such a draw reads no hidden state and has no tokens.
    is_row = (row >= 0) & (row < num_rows) & (position >= 0) & (position < 4294967296)
    inverse = 1.0 / tl.load(temperature_ptr + draws, mask=is_draw, other=1.0)
    is_tempered = tl.max((inverse != 1.0).to(tl.int32), axis=0) > 0
    trajectory = tl.load(trajectory_ptr + draws, mask=is_draw, other=0)[:, None]
    position = position[:, None]
    seed = tl.load(seed_ptr)
    barred = tl.where(tl.load(forbid_ptr + draws, mask=is_draw, other=0), stop, -1)
    depth = tl.arange(0, BLOCK_D)
    # A step of the width may be as long as the vocabulary, so that products of 32 bits would overflow.
    stride_h_d = tl.cast(stride_h_d, tl.int64)
    stride_w_d = tl.cast(stride_w_d, tl.int64)
    h_ptrs = hidden_ptr + (row * stride_h_r)[:, None] + depth[None, :] * stride_h_d
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    tempered = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    token = tl.full((BLOCK_M,), 0, tl.int32)
    z_token = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z_stop = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for tile in range(TILES):
        start = (split * TILES + tile) * BLOCK_V
        columns = start + tl.arange(0, BLOCK_V)
        in_vocab = columns < vocab
        w_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_w_v + depth[:, None] * stride_w_d
        z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for d in range(0, WIDTH, BLOCK_D):
            h_mask, w_mask = is_row[:, None], in_vocab[None, :]
            if WIDTH % BLOCK_D != 0:
                h_mask = h_mask & (d + depth < WIDTH)[None, :]
                w_mask = w_mask & (d + depth < WIDTH)[:, None]
            h = tl.load(h_ptrs + d * stride_h_d, mask=h_mask, other=0.0)
            w = tl.load(w_ptrs + d * stride_w_d, mask=w_mask, other=0.0)
            if INTERPRETED:
                # It would multiply the bits of bfloat16.
                h, w = h.to(tl.float32), w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="tf32x3")
        if HAS_BIAS:
            z += tl.load(bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)[None, :]
        z *= pre_scale
        if HAS_SOFTCAP:
            z, _ = _tanh(z)
            z *= post_scale
        if HAS_LOGIT_BIAS:
            z += tl.load(logit_bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)[None, :]
        peak, total, tempered, best, token, z_token, z_stop = _absorb(
            z, start, stop, barred, is_row, is_tempered, inverse, trajectory, position, seed, vocab,
            peak, total, tempered, best, token, z_token, z_stop,
        )  # fmt: skip
    at = draws * num_splits + split
    size = num_draws.to(tl.int64) * num_splits
    tl.store(partials_ptr + at, peak, mask=is_draw)
    tl.store(partials_ptr + size + at, total, mask=is_draw)
    tl.store(partials_ptr + 2 * size + at, tl.where(is_tempered, tempered, total), mask=is_draw)
    tl.store(partials_ptr + 3 * size + at, best, mask=is_draw)
    tl.store(partials_ptr + 4 * size + at, z_token, mask=is_draw)
    tl.store(partials_ptr + 5 * size + at, z_stop, mask=is_draw)
    tl.store(tokens_ptr + at, token, mask=is_draw)


def fused_draw(
    hidden: Tensor,  # (R, D) float32 | bfloat16 | float16, any strides
    weight: Tensor,  # (V, D) same dtype, any strides
    bias: Tensor | None,  # (V,) contiguous
    logit_bias: Tensor | None,  # (V,) contiguous
    logit_scale: float,
    softcap: float | None,
    rows: Tensor,
    temperature: Tensor,
    trajectory: Tensor,
    position: Tensor,
    seed: Tensor,
    stop: int,
    forbid_stop: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As draw_from_logits, of softcap(logit_scale * (hidden weight.T + bias)) + logit_bias, never written.

    The weight is read once per BLOCK_M draws, 2 K V D operations; 28 bytes per draw and split are written.
    """
    num_draws, (vocab, width) = rows.shape[0], weight.shape
    block_m, block_v, block_d, warps, stages = head_blocks(num_draws, hidden.element_size())
    tiles, splits = _splits(triton.cdiv(vocab, block_v), hidden.device)
    partials, tokens = draw_partials(rows, num_draws, splits)
    if num_draws:
        with torch.cuda.device_of(hidden):
            _fused_draw_kernel[(triton.cdiv(num_draws, block_m), splits)](
                hidden,
                weight,
                weight if bias is None else bias,
                weight if logit_bias is None else logit_bias,
                rows,
                temperature,
                trajectory,
                position,
                seed,
                forbid_stop,
                partials,
                tokens,
                hidden.shape[0],
                num_draws,
                vocab,
                stop,
                *hidden.stride(),
                *weight.stride(),
                logit_scale if softcap is None else logit_scale / softcap,
                1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None,
                HAS_LOGIT_BIAS=logit_bias is not None,
                HAS_SOFTCAP=softcap is not None,
                WIDTH=width,
                TILES=tiles,
                BLOCK_M=block_m,
                BLOCK_V=block_v,
                BLOCK_D=block_d,
                num_warps=warps,
                num_stages=stages,
            )
    return combine_draws(partials, tokens, temperature)


def head_blocks(num_draws: int, element_size: int) -> tuple[int, ...]:
    """BLOCK_M, BLOCK_V, BLOCK_D, warps and stages for K draws."""
    table = HEAD_BLOCKS[element_size]
    return next(blocks for limit, blocks in table if limit is None or num_draws <= limit)


def _splits(num_tiles: int, device: torch.device) -> tuple[int, int]:
    """Tiles of a split and splits: as many as run at once."""
    tiles = triton.cdiv(num_tiles, PROGRAMS_PER_SM * _num_sms(device))
    return tiles, triton.cdiv(num_tiles, tiles)


def _num_sms(device: torch.device) -> int:
    # The interpreter has none; the H200's count keeps its tests at real splits.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
