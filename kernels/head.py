"""The row pass of the head: lse and the softmax P' from products hidden W^T, and the logits that are read.

Equations: fastgfn/reference/linear_log_probs.py. An entry is a (row, column) pair whose log-probability is
read; its logit is a dot product of its own in float32, so log p and 1 - p of a confident token lose nothing
to the products' dtype. The row pass stands between two matrix products and moves 10 bytes per float32 logit
(read twice, P' written in 16 bits), the second read partly from L2: 0.9 to 1.2 ms for R = 4096, V = 128256 at
4.3 TB/s, where the two products take 5.4 ms at D = 2048 and 790 TFLOP/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgfn.kernels.log_probs import LOWEST, _scales, _transform

# Row kernel: (logits of one tile, warps); 75 to 96 registers, so 2 or 3 rows per multiprocessor hide each
# other's latency.
ROW_TILE = (4096, 8)
# Entries: (entries, width of one tile).
ENTRY_TILE = (16, 256)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to full precision: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


# One program computes BLOCK_E entries' logits in float32, hidden[row] . weight[column] and then scale, bias,
# softcap, mask and temperature. Grid (entries / BLOCK_E,). Writes the logits, NaN where the row or the column
# is out of range, and the softcap's derivative.
@triton.jit(do_not_specialize=["num_entries", "num_rows", "num_policy"])
def _entry_logits_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    rows_ptr,
    columns_ptr,
    logits_ptr,
    slope_ptr,
    num_entries,
    num_rows,
    num_policy,
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
    HAS_TWO_MASKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_entry = entries < num_entries
    rows = tl.load(rows_ptr + entries, mask=is_entry, other=0).to(tl.int64)
    columns = tl.load(columns_ptr + entries, mask=is_entry, other=0).to(tl.int64)
    in_range = (rows >= 0) & (rows < num_rows) & (columns >= 0) & (columns < vocab)
    rows = tl.where(in_range, rows, 0)
    columns = tl.where(in_range, columns, 0)
    depth = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden_r + depth[None, :] * stride_hidden_d
    weight_ptrs = weight_ptr + columns[:, None] * stride_weight_v + depth[None, :] * stride_weight_d
    sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        in_width = (depth < WIDTH - start)[None, :] & in_range[:, None]
        h = tl.load(hidden_ptrs, mask=in_width, other=0.0).to(tl.float32)
        w = tl.load(weight_ptrs, mask=in_width, other=0.0).to(tl.float32)
        sums += h * w
        hidden_ptrs += BLOCK_D * stride_hidden_d
        weight_ptrs += BLOCK_D * stride_weight_d
    x = tl.sum(sums, axis=1)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns).to(tl.float32)
    extra = 0.0
    if HAS_MASK:
        mask_offset = columns
        if HAS_TWO_MASKS:
            mask_offset += tl.where(rows < num_policy, 0, vocab)
        extra = tl.load(mask_ptr + mask_offset)
    z, slope = _transform(x, extra, pre_scale, post_scale, mask_scale, HAS_SOFTCAP, HAS_MASK)
    tl.store(logits_ptr + entries, tl.where(in_range, z, float("nan")), mask=is_entry)
    tl.store(slope_ptr + entries, slope, mask=is_entry)


@triton.jit
def _entries(columns_ptr, start, end, vocab, BLOCK_E: tl.constexpr):
    """The next entries of a row, their columns, and which exist and have a column in range."""
    e = start + tl.arange(0, BLOCK_E)
    columns = tl.load(columns_ptr + e, mask=e < end, other=-1).to(tl.int64)
    return e, columns, (columns >= 0) & (columns < vocab)


# One program reads one row of products hidden W^T: it sets the row's entries to -inf in place, takes a
# running maximum and sum per lane over the rest, merges the entries' own logits, and writes P' = softmax *
# softcap', 0 at the entries, over the row. Grid (rows,). Writes lse_parts and, below num_grad_rows, P'.
@triton.jit(do_not_specialize=["first_row", "num_policy", "num_grad_rows"])
def _row_pass_fwd_kernel(
    logits_ptr,
    p_ptr,
    bias_ptr,
    mask_ptr,
    entry_starts_ptr,
    entry_columns_ptr,
    entry_logits_ptr,
    lse_parts_ptr,
    first_row,
    num_rows,
    num_policy,
    num_grad_rows,
    vocab,
    padded,
    stride_logits_r,
    stride_p_r,
    pre_scale,
    post_scale,
    mask_scale,
    p_scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TWO_MASKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    logits_row = logits_ptr + local * stride_logits_r
    mask_row = mask_ptr
    if HAS_TWO_MASKS:
        mask_row += tl.where(row < num_policy, 0, vocab)
    own = tl.load(entry_starts_ptr + row).to(tl.int64)
    end = tl.load(entry_starts_ptr + row + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    start = own
    while start < end:
        e, column, is_read = _entries(entry_columns_ptr, start, end, vocab, BLOCK_E)
        dead = tl.full((BLOCK_E,), float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
        tl.store(logits_row + column, dead, mask=is_read)
        start += BLOCK_E
    tl.debug_barrier()

    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK + lanes
        # The loads are bounded by the padded row, which has the alignment that `vocab` may lack.
        in_row, in_vocab = columns < padded, columns < vocab
        x = tl.load(logits_row + columns, mask=in_row, other=0.0).to(tl.float32)
        is_dead = (x == float("-inf")) | (columns >= vocab)
        x = tl.where(is_dead, 0.0, x)
        if HAS_BIAS:
            x += tl.load(bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)
        extra = 0.0
        if HAS_MASK:
            extra = tl.load(mask_row + columns, mask=in_vocab, other=0.0)
        z, _ = _transform(x, extra, pre_scale, post_scale, mask_scale, HAS_SOFTCAP, HAS_MASK)
        z = tl.where(is_dead, float("-inf"), z)
        higher = tl.maximum(peaks, z)
        totals = totals * tl.exp(peaks - higher) + tl.exp(z - higher)
        peaks = higher

    rest_peak = tl.max(peaks, axis=0)
    peak = rest_peak
    start = own
    while start < end:
        e, column, is_read = _entries(entry_columns_ptr, start, end, vocab, BLOCK_E)
        z = tl.load(entry_logits_ptr + e, mask=is_read, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(z, axis=0))
        start += BLOCK_E
    # total = ones + others: where an entry holds the maximum, 1 - p of that entry comes from `others` alone.
    others = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    ones = others * 0.0
    start = own
    while start < end:
        e, column, is_read = _entries(entry_columns_ptr, start, end, vocab, BLOCK_E)
        z = tl.load(entry_logits_ptr + e, mask=is_read, other=float("-inf"))
        ones += tl.sum(tl.where(z == peak, 1.0, 0.0), axis=0)
        others += tl.sum(tl.where(z == peak, 0.0, tl.exp(z - peak)), axis=0)
        start += BLOCK_E
    has_ones = ones > 0.0
    log_rest = tl.log(tl.where(has_ones, 1.0, others))
    log_total = tl.where(has_ones, _log1p(others + tl.maximum(ones - 1.0, 0.0)), log_rest)
    tl.store(lse_parts_ptr + row, peak)
    tl.store(lse_parts_ptr + num_rows + row, log_total)

    if row < num_grad_rows:
        p_row = p_ptr + local * stride_p_r
        for i in range(NUM_TILES):
            # Backwards: the tiles read last are in L2, and P' grows down from the row's end.
            columns = (NUM_TILES - 1 - i) * BLOCK + lanes
            in_row, in_vocab = columns < padded, columns < vocab
            x = tl.load(logits_row + columns, mask=in_row, other=0.0).to(tl.float32)
            is_dead = (x == float("-inf")) | (columns >= vocab)
            x = tl.where(is_dead, 0.0, x)
            if HAS_BIAS:
                x += tl.load(bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)
            extra = 0.0
            if HAS_MASK:
                extra = tl.load(mask_row + columns, mask=in_vocab, other=0.0)
            z, slope = _transform(x, extra, pre_scale, post_scale, mask_scale, HAS_SOFTCAP, HAS_MASK)
            z = tl.where(is_dead, float("-inf"), z)
            p = tl.exp((z - peak) - log_total) * slope * p_scale
            # P' may lie over logits of this tile that another thread has yet to read.
            tl.debug_barrier()
            tl.store(p_row + columns, p.to(p_ptr.dtype.element_ty), mask=in_row)


IS_INTERPRETED = not isinstance(_row_pass_fwd_kernel, triton.JITFunction)


def _flags(bias: Tensor | None, masks: Tensor | None, softcap: float | None) -> dict[str, bool]:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_MASK": masks is not None,
        "HAS_TWO_MASKS": masks is not None and masks.shape[0] == 2,
        "HAS_SOFTCAP": softcap is not None,
    }


def entry_logits(
    hidden: Tensor,  # (R, D) float32 | bfloat16 | float16, any strides
    weight: Tensor,  # (V, D) same dtype, any strides
    bias: Tensor | None,  # (V,) contiguous
    masks: Tensor | None,  # (1 | 2, V) float32 contiguous; the second for rows from num_policy on
    rows: Tensor,  # (E,) int64
    columns: Tensor,  # (E,) int64
    num_policy: int,
    scales: tuple[float, float | None, float],  # logit scale, softcap, temperature
) -> tuple[Tensor, Tensor]:
    """The logits of the entries, NaN for one out of range, and the softcap's derivative, (E,) float32."""
    num_entries, (vocab, width) = rows.shape[0], weight.shape
    logits = torch.empty(num_entries, dtype=torch.float32, device=hidden.device)
    slope = torch.empty_like(logits)
    block_e, block_d = ENTRY_TILE
    if num_entries:
        with torch.cuda.device_of(hidden):
            _entry_logits_fwd_kernel[(triton.cdiv(num_entries, block_e),)](
                hidden,
                weight,
                weight if bias is None else bias,
                logits if masks is None else masks,
                rows,
                columns,
                logits,
                slope,
                num_entries,
                hidden.shape[0],
                num_policy,
                vocab,
                *hidden.stride(),
                *weight.stride(),
                *_scales(*scales),
                **_flags(bias, masks, scales[1]),
                WIDTH=width,
                BLOCK_E=block_e,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return logits, slope


def row_pass(
    logits: Tensor,  # (rows of the chunk, S >= V) float32 or the dtype of p; rows contiguous
    p: Tensor,  # (rows of the chunk, S), may be the upper half of the rows of `logits`
    bias: Tensor | None,
    masks: Tensor | None,
    entries: tuple[Tensor, Tensor, Tensor],  # starts (R + 1,), columns (E,), logits (E,), sorted by row
    lse_parts: Tensor,  # (2, R) float32, written
    first_row: int,
    num_policy: int,
    num_grad_rows: int,
    vocab: int,
    scales: tuple[float, float | None, float],
    p_scale: float,
) -> None:
    """Write lse_parts of the rows of the chunk and, for rows below num_grad_rows, p_scale * P' into p."""
    block, num_warps = ROW_TILE
    block = min(block, max(16, triton.next_power_of_2(vocab)))
    starts, columns, entry_z = entries
    with torch.cuda.device_of(logits):
        _row_pass_fwd_kernel[(logits.shape[0],)](
            logits,
            p,
            logits if bias is None else bias,
            lse_parts if masks is None else masks,
            starts,
            columns,
            entry_z,
            lse_parts,
            first_row,
            lse_parts.shape[1],
            num_policy,
            num_grad_rows,
            vocab,
            logits.shape[1],
            logits.stride(0),
            p.stride(0),
            *_scales(*scales),
            p_scale,
            **_flags(bias, masks, scales[1]),
            NUM_TILES=triton.cdiv(vocab, block),
            BLOCK=block,
            BLOCK_E=16,
            num_warps=num_warps,
        )
