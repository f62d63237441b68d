"""Log-probabilities of one target and the stop token per row of materialised logits, and their gradient.

Equations: fastgfn/reference/linear_log_probs.py, with S = {target, stop}.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(x):
    """tanh and its derivative; the series avoids the cancellation of 1 - exp(-2|x|) near 0."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 - q * (17.0 / 315.0))))
    value = tl.where(q < 0.04, near, tl.where(x < 0, -far, far))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _one_minus_exp(y):
    """1 - exp(-y) for y >= 0, by the series where it would cancel."""
    near = y * (1.0 - y * 0.5 * (1.0 - y / 3.0 * (1.0 - y * 0.25 * (1.0 - y * 0.2))))
    return tl.where(y < 0.1, near, 1.0 - tl.exp(-y))


@triton.jit
def _transform(
    x, logit_bias, pre_scale, post_scale, bias_scale, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Logits after scale, softcap, bias and temperature, and the derivative of the softcap."""
    z = x.to(tl.float32) * pre_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        z, slope = _tanh(z)
        z = z * post_scale
    if HAS_BIAS:
        z += logit_bias * bias_scale
    return z, slope


# One program reads one row: a running maximum and sum per lane over tiles of the vocabulary, then the logits
# of the target and the stop token. Grid (M,). Writes log_pf, log_pterm and the two parts of lse (the maximum
# and the rest); a target out of range writes NaN.
@triton.jit(do_not_specialize=["stop", "ignore_index"])
def _log_probs_fwd_kernel(
    logits_ptr,
    targets_ptr,
    logit_bias_ptr,
    log_pf_ptr,
    log_pterm_ptr,
    lse_parts_ptr,
    num_rows,
    stride_m,
    stride_v,
    vocab,
    stop,
    ignore_index,
    pre_scale,
    post_scale,
    bias_scale,
    HAS_STOP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_m
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        in_vocab = columns < vocab
        x = tl.load(logits_row + columns * stride_v, mask=in_vocab, other=0.0)
        extra = 0.0
        if HAS_BIAS:
            extra = tl.load(logit_bias_ptr + columns, mask=in_vocab, other=0.0)
        z, _ = _transform(x, extra, pre_scale, post_scale, bias_scale, HAS_SOFTCAP, HAS_BIAS)
        z = tl.where(in_vocab, z, float("-inf"))
        higher = tl.maximum(peaks, z)
        totals = totals * tl.exp(peaks - higher) + tl.exp(z - higher)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    log_total = tl.log(tl.sum(totals * tl.exp(peaks - peak), axis=0))
    tl.store(lse_parts_ptr + row, peak)
    tl.store(lse_parts_ptr + num_rows + row, log_total)

    target = tl.load(targets_ptr + row).to(tl.int64)
    is_read = target != ignore_index
    in_range = (target >= 0) & (target < vocab)
    x = tl.load(logits_row + target * stride_v, mask=is_read & in_range, other=float("nan"))
    extra = 0.0
    if HAS_BIAS:
        extra = tl.load(logit_bias_ptr + target, mask=is_read & in_range, other=0.0)
    z, _ = _transform(x, extra, pre_scale, post_scale, bias_scale, HAS_SOFTCAP, HAS_BIAS)
    tl.store(log_pf_ptr + row, tl.where(is_read, (z - peak) - log_total, 0.0))
    if HAS_STOP:
        x = tl.load(logits_row + stop.to(tl.int64) * stride_v)
        if HAS_BIAS:
            extra = tl.load(logit_bias_ptr + stop)
        z, _ = _transform(x, extra, pre_scale, post_scale, bias_scale, HAS_SOFTCAP, HAS_BIAS)
        tl.store(log_pterm_ptr + row, (z - peak) - log_total)


# One program writes the gradient of one tile of one row. Grid (M, tiles). Writes dlogits, contiguous (M, V).
@triton.jit(do_not_specialize=["stop", "ignore_index"])
def _log_probs_bwd_kernel(
    logits_ptr,
    targets_ptr,
    logit_bias_ptr,
    lse_parts_ptr,
    grad_log_pf_ptr,
    grad_log_pterm_ptr,
    grad_lse_ptr,
    grad_logits_ptr,
    num_rows,
    stride_m,
    stride_v,
    vocab,
    stop,
    ignore_index,
    pre_scale,
    post_scale,
    bias_scale,
    factor,
    HAS_STOP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    in_vocab = columns < vocab
    target = tl.load(targets_ptr + row).to(tl.int64)
    grad_pf = tl.load(grad_log_pf_ptr + row)
    grad_pf = tl.where(target != ignore_index, grad_pf, 0.0)
    grad_lse = tl.load(grad_lse_ptr + row)
    peak = tl.load(lse_parts_ptr + row)
    log_total = tl.load(lse_parts_ptr + num_rows + row)

    x = tl.load(logits_ptr + row * stride_m + columns * stride_v, mask=in_vocab, other=0.0)
    extra = 0.0
    if HAS_BIAS:
        extra = tl.load(logit_bias_ptr + columns, mask=in_vocab, other=0.0)
    z, slope = _transform(x, extra, pre_scale, post_scale, bias_scale, HAS_SOFTCAP, HAS_BIAS)
    # Infinite off the vocabulary: a common offset of the logits would overflow there.
    minus_log_p = tl.where(in_vocab, log_total - (z - peak), float("inf"))
    p = tl.exp(-minus_log_p)
    own = tl.where(columns == target, grad_pf, 0.0)
    total = grad_pf
    if HAS_STOP:
        grad_pterm = tl.load(grad_log_pterm_ptr + row)
        own += tl.where(columns == stop, grad_pterm, 0.0)
        total += grad_pterm
    grad = (own * _one_minus_exp(minus_log_p) - p * ((total - own) - grad_lse)) * slope * factor
    tl.store(
        grad_logits_ptr + row * vocab + columns, grad.to(grad_logits_ptr.dtype.element_ty), mask=in_vocab
    )


IS_INTERPRETED = not isinstance(_log_probs_fwd_kernel, triton.JITFunction)


def _scales(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    if softcap is None:
        return logit_scale / temperature, 1.0, 1.0 / temperature
    return logit_scale / softcap, softcap / temperature, 1.0 / temperature


def _block(vocab: int) -> int:
    return min(BLOCK_V, max(16, triton.next_power_of_2(vocab)))


def log_probs_fwd(
    logits: Tensor,  # (M, V) float32 | bfloat16 | float16, any strides
    targets: Tensor,  # (M,) int32 | int64
    stop: int | None,
    logit_bias: Tensor | None,  # (V,) contiguous
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_pf (M,), log_pterm (M,) or (0,), lse (M,) and its parts (2, M), float32."""
    num_rows, vocab = logits.shape
    log_pf = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    lse_parts = log_pf.new_empty(2, num_rows)
    log_pterm = log_pf.new_empty(0 if stop is None else num_rows)
    block = _block(vocab)
    if num_rows:
        with torch.cuda.device_of(logits):
            _log_probs_fwd_kernel[(num_rows,)](
                logits,
                targets,
                logits if logit_bias is None else logit_bias,
                log_pf,
                log_pterm if stop is not None else log_pf,
                lse_parts,
                num_rows,
                *logits.stride(),
                vocab,
                0 if stop is None else stop,
                ignore_index,
                *_scales(logit_scale, softcap, temperature),
                HAS_STOP=stop is not None,
                HAS_SOFTCAP=softcap is not None,
                HAS_BIAS=logit_bias is not None,
                NUM_TILES=triton.cdiv(vocab, block),
                BLOCK=block,
                num_warps=8,
            )
    return log_pf, log_pterm, lse_parts.sum(0), lse_parts


def log_probs_bwd(
    grad_log_pf: Tensor,  # (M,) float32
    grad_log_pterm: Tensor,  # (M,) float32, or (0,) without a stop token
    grad_lse: Tensor,  # (M,) float32
    logits: Tensor,
    targets: Tensor,
    lse_parts: Tensor,  # (2, M) float32
    stop: int | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """d logits (M, V), contiguous, in the dtype of `logits`."""
    num_rows, vocab = logits.shape
    grad = torch.empty(num_rows, vocab, dtype=logits.dtype, device=logits.device)
    block = _block(vocab)
    if num_rows:
        with torch.cuda.device_of(logits):
            _log_probs_bwd_kernel[(num_rows, triton.cdiv(vocab, block))](
                logits,
                targets,
                logits if logit_bias is None else logit_bias,
                lse_parts,
                grad_log_pf,
                grad_log_pf if stop is None else grad_log_pterm,
                grad_lse,
                grad,
                num_rows,
                *logits.stride(),
                vocab,
                0 if stop is None else stop,
                ignore_index,
                *_scales(logit_scale, softcap, temperature),
                logit_scale / temperature,
                HAS_STOP=stop is not None,
                HAS_SOFTCAP=softcap is not None,
                HAS_BIAS=logit_bias is not None,
                BLOCK=block,
                num_warps=8,
            )
    return grad
