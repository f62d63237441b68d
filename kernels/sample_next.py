"""Next-token draws from logits, with the log-probs of the draw and of stopping.

Equations and noise: fastgfn/reference/sample_next.py. A draw is argmax_v z_v / temperature + gumbel_v. These
scores are in float32 and functions of their token alone, so the token does not depend on tiles or splits. A
split hands on its maximum, the sums of exp(z - maximum) at temperature 1 and at the draw's (the second only
where it is not 1), the best token with its score and logit, and the logit of the stop token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)
# No draw is left, or the logits are not numbers: the token is this, the log-probs are NaN.
NO_TOKEN = -1

# Logits of one tile, and tiles of one split: fixed, so that a draw has the same bits in every batch.
LOGITS_BLOCK = 4096
LOGITS_TILES = 2
# Partial results per program of the merge.
COMBINE_BLOCK = 1024


@triton.jit
def _philox(block, position, trajectory, seed):
    """The noise words of tokens 4 * block + (0, 1, 2, 3): Philox4x32-10, uint32."""
    a: tl.constexpr = 0xD2511F53
    b: tl.constexpr = 0xCD9E8D57
    c0 = block.to(tl.uint32)
    c1 = position.to(tl.uint32)
    c2 = trajectory.to(tl.uint32)
    c3 = (trajectory >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        old0, old2 = c0, c2
        c0 = tl.umulhi(b, old2) ^ c1 ^ k0
        c2 = tl.umulhi(a, old0) ^ c3 ^ k1
        c1 = tl.mul(b, old2, sanitize_overflow=False)
        c3 = tl.mul(a, old0, sanitize_overflow=False)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _gumbel(word):
    """-log(E) of the exponential E = -log(1 - u), u = (word + 0.5) / 2^32, to about 1e-6 wherever it is.

    1 - u comes from the integer 2^32 - 1 - word: u in float32 would be 1 from 2^32 - 128 on. Below u = 1/8,
    where 1 - u loses the low bits that keep the winners apart, E is its series.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    tail = 1.0 / 5 + u * (1.0 / 6 + u * (1.0 / 7 + u * (1.0 / 8)))
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * (1.0 / 4 + u * tail))))
    return -tl.log(tl.where(u < 0.125, series, -tl.log(rest)))


@triton.jit
def _noise(block, position, trajectory, seed):
    """Gumbel noise of the tokens of `block` (..., B), four times as wide, in the order of the tokens."""
    w0, w1, w2, w3 = _philox(block, position, trajectory, seed)
    return _gumbel(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


# One program scans one split of the row of one draw. Grid (K, splits).
# Writes partials (6, K, splits): maximum, the two sums, best score, logits of the best and of the stop token;
# and the best token (K, splits).
@triton.jit(do_not_specialize=["num_rows", "num_draws", "stop"])
def _draw_from_logits_kernel(
    logits_ptr,
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
    stride_r,
    vocab,
    stop,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draw = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row = tl.load(rows_ptr + draw)
    position = tl.load(position_ptr + draw)
    # A row that does not exist, or a position that the noise would alias, has no tokens.
    is_valid = (row >= 0) & (row < num_rows) & (position >= 0) & (position < 4294967296)
    end = tl.where(is_valid, vocab, 0)
    inverse = 1.0 / tl.load(temperature_ptr + draw)
    trajectory = tl.load(trajectory_ptr + draw)
    seed = tl.load(seed_ptr)
    barred = tl.where(tl.load(forbid_ptr + draw), stop, -1)
    logits_row = logits_ptr + row * stride_r
    peak = tl.full((), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    tempered = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    first = split * (TILES * BLOCK)
    for tile in range(TILES):
        start = first + tile * BLOCK
        columns = start + tl.arange(0, BLOCK)
        is_allowed = (columns < end) & (columns != barred)
        z = tl.load(logits_row + columns, mask=is_allowed, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, axis=0))
        totals = totals * tl.exp(peak - higher) + tl.exp(z - higher)
        if inverse != 1.0:
            tempered = tempered * tl.exp((peak - higher) * inverse) + tl.exp((z - higher) * inverse)
        peak = higher
        blocks = start // 4 + tl.arange(0, BLOCK // 4)
        score = z * inverse + _noise(blocks, position, trajectory, seed)
        token = tl.where(score > best, columns, token)
        best = tl.maximum(best, score)
    top = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == top, token, 0x7FFFFFFF), axis=0)
    winner = tl.where(top > float("-inf"), winner, first)
    has_stop = (stop >= first) & (stop < tl.minimum(first + TILES * BLOCK, end)) & (stop != barred)
    z_token = tl.load(logits_row + winner, mask=winner < end, other=float("-inf")).to(tl.float32)
    z_stop = tl.load(logits_row + stop, mask=has_stop, other=float("-inf")).to(tl.float32)
    total = tl.sum(totals, axis=0)
    at = draw * num_splits + split
    size = num_draws.to(tl.int64) * num_splits
    tl.store(partials_ptr + at, peak)
    tl.store(partials_ptr + size + at, total)
    tl.store(partials_ptr + 2 * size + at, tl.where(inverse == 1.0, total, tl.sum(tempered, axis=0)))
    tl.store(partials_ptr + 3 * size + at, top)
    tl.store(partials_ptr + 4 * size + at, z_token)
    tl.store(partials_ptr + 5 * size + at, z_stop)
    tl.store(tokens_ptr + at, winner)


# One program merges the splits of BLOCK_K draws, in a fixed order. Grid (cdiv(K, BLOCK_K),).
# Writes the tokens and their three log-probs; NO_TOKEN and NaN where no token has a finite logit, the row or
# position is out of range or a number is not one.
@triton.jit(do_not_specialize=["num_draws", "num_splits"])
def _draw_combine_kernel(
    partials_ptr,
    tokens_ptr,
    temperature_ptr,
    token_ptr,
    log_pf_ptr,
    log_pterm_ptr,
    log_behavior_ptr,
    num_draws,
    num_splits,
    NONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    draws = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    splits = tl.arange(0, BLOCK_S)
    is_draw = draws < num_draws
    is_part = is_draw[:, None] & (splits < num_splits)[None, :]
    at = draws[:, None] * num_splits + splits[None, :]
    size = num_draws.to(tl.int64) * num_splits
    temperature = tl.load(temperature_ptr + draws, mask=is_draw, other=1.0)
    inverse = 1.0 / temperature
    peaks = tl.load(partials_ptr + at, mask=is_part, other=LOWEST)
    totals = tl.load(partials_ptr + size + at, mask=is_part, other=0.0)
    tempered = tl.load(partials_ptr + 2 * size + at, mask=is_part, other=0.0)
    best = tl.load(partials_ptr + 3 * size + at, mask=is_part, other=float("-inf"))
    z_tokens = tl.load(partials_ptr + 4 * size + at, mask=is_part, other=float("-inf"))
    z_stops = tl.load(partials_ptr + 5 * size + at, mask=is_part, other=float("-inf"))
    tokens = tl.load(tokens_ptr + at, mask=is_part, other=0x7FFFFFFF)
    peak = tl.max(peaks, axis=1)
    below = peaks - peak[:, None]
    total = tl.sum(totals * tl.exp(below), axis=1)
    at_temperature = tl.sum(tempered * tl.exp(below * inverse[:, None]), axis=1)
    top = tl.max(best, axis=1)
    is_top = best == top[:, None]
    # Of equal scores the smallest token wins, as within a split.
    token = tl.min(tl.where(is_top, tokens, 0x7FFFFFFF), axis=1)
    is_winner = is_top & (tokens == token[:, None])
    z_token = tl.max(tl.where(is_winner, z_tokens, float("-inf")), axis=1) - peak
    z_stop = tl.max(z_stops, axis=1) - peak
    is_valid = (total > 0.0) & (total < float("inf")) & (top > float("-inf")) & (top < float("inf"))
    is_valid &= (at_temperature > 0.0) & (at_temperature < float("inf"))
    is_valid &= (temperature > 0.0) & (temperature < float("inf"))
    log_total = tl.where(is_valid, tl.log(total), float("nan"))
    tl.store(token_ptr + draws, tl.where(is_valid, token, NONE).to(tl.int64), mask=is_draw)
    tl.store(log_pf_ptr + draws, z_token - log_total, mask=is_draw)
    tl.store(log_pterm_ptr + draws, z_stop - log_total, mask=is_draw)
    log_total = tl.where(is_valid, tl.log(at_temperature), float("nan"))
    tl.store(log_behavior_ptr + draws, z_token * inverse - log_total, mask=is_draw)


IS_INTERPRETED = not isinstance(_draw_from_logits_kernel, triton.JITFunction)


def draw_from_logits(
    logits: Tensor,  # (R, V) float32 | bfloat16 | float16, contiguous rows
    rows: Tensor,  # (K,) int64
    temperature: Tensor,  # (K,) float32
    trajectory: Tensor,  # (K,) int64
    position: Tensor,  # (K,) int64
    seed: Tensor,  # (1,) int64
    stop: int,
    forbid_stop: Tensor,  # (K,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token (K,) int64, log_pf, log_pterm and log_behavior (K,) float32; no host synchronisation.

    Reads 4 V bytes per draw; about 60 instructions per logit, so the two are near balance on an H200.
    """
    num_draws, (num_rows, vocab) = rows.shape[0], logits.shape
    block = min(LOGITS_BLOCK, max(16, triton.next_power_of_2(vocab)))
    splits = triton.cdiv(vocab, block * LOGITS_TILES)
    partials, tokens = draw_partials(rows, num_draws, splits)
    if num_draws:
        with torch.cuda.device_of(logits):
            _draw_from_logits_kernel[(num_draws, splits)](
                logits,
                rows,
                temperature,
                trajectory,
                position,
                seed,
                forbid_stop,
                partials,
                tokens,
                num_rows,
                num_draws,
                logits.stride(0),
                vocab,
                stop,
                TILES=LOGITS_TILES,
                BLOCK=block,
                num_warps=8,
            )
    return combine_draws(partials, tokens, temperature)


def draw_partials(rows: Tensor, num_draws: int, splits: int) -> tuple[Tensor, Tensor]:
    shape = (num_draws, splits)
    return rows.new_empty((6, *shape), dtype=torch.float32), rows.new_empty(shape, dtype=torch.int32)


def combine_draws(
    partials: Tensor, tokens: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_draws, splits = tokens.shape
    token = tokens.new_empty(num_draws, dtype=torch.int64)
    log_probs = [partials.new_empty(num_draws) for _ in range(3)]
    block_s = triton.next_power_of_2(splits)
    block_k = max(1, COMBINE_BLOCK // block_s)
    if num_draws:
        with torch.cuda.device_of(partials):
            _draw_combine_kernel[(triton.cdiv(num_draws, block_k),)](
                partials,
                tokens,
                temperature,
                token,
                *log_probs,
                num_draws,
                splits,
                NONE=NO_TOKEN,
                BLOCK_K=block_k,
                BLOCK_S=block_s,
                num_warps=4,
            )
    return token, *log_probs
