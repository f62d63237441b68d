"""Log-probabilities of materialised logits: the dispatcher ops `fastgfn::log_probs_from_logits` and its
backward, in Triton (kernels/log_probs.py) or torch. Equations: `reference/linear_log_probs.py`, with
S = {target, stop}."""

import functools

import torch
from torch import Tensor

# Rows are processed in groups of about this many logits, so that the float32 copies stay in cache.
CHUNK_ELEMENTS = 2**19


def log_probs_from_logits(
    logits: Tensor,  # (M, V) floating point, any strides
    targets: Tensor,  # (M,) int32 | int64, any strides
    *,
    termination_token_id: int | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,  # "triton" | "torch"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_pf (M,), log_pterm (M,) or None, lse (M,); see `functional.log_probs.log_probs_from_logits`."""
    log_pf, log_pterm, lse, _ = torch.ops.fastgfn.log_probs_from_logits(
        logits,
        targets.contiguous(),
        termination_token_id,
        None if logit_bias is None else logit_bias.to(_compute_dtype(logits)).contiguous(),
        logit_scale,
        final_logit_softcap,
        temperature,
        ignore_index,
        backend == "triton",
    )
    return log_pf, None if termination_token_id is None else log_pterm, lse


@functools.cache
def triton_runs_on(device_type: str) -> bool:
    """CUDA tensors when compiled, any tensor in the interpreter."""
    try:
        from fastgfn.kernels import log_probs
    except ImportError:
        return False
    return log_probs.IS_INTERPRETED or device_type == "cuda"


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastgfn::log_probs_from_logits", mutates_args=())
def _log_probs(
    logits: Tensor,
    targets: Tensor,
    stop: int | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    is_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_pf (M,), log_pterm (M,) or (0,), lse (M,) and its exact parts (2, M): the maximum and the rest."""
    if is_triton:
        from fastgfn.kernels.log_probs import log_probs_fwd

        return log_probs_fwd(
            logits, targets, stop, logit_bias, logit_scale, softcap, temperature, ignore_index
        )
    num_rows, dtype = logits.shape[0], _compute_dtype(logits)
    log_pf = logits.new_empty(num_rows, dtype=dtype)
    log_pterm = log_pf.new_empty(0 if stop is None else num_rows)
    lse_parts = log_pf.new_empty(2, num_rows)
    ignored = targets == ignore_index
    columns = targets.masked_fill(ignored, 0).long()[:, None]
    for span in _chunks(logits):
        z, _ = _transform(logits[span], logit_bias, logit_scale, softcap, temperature)
        peak = z.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        read = z.gather(1, columns[span]) - peak
        at_stop = None if stop is None else z[:, stop : stop + 1] - peak
        log_total = z.sub_(peak).exp_().sum(1, keepdim=True).log_()
        log_pf[span] = (read - log_total)[:, 0]
        if at_stop is not None:
            log_pterm[span] = (at_stop - log_total)[:, 0]
        lse_parts[:, span] = torch.cat([peak, log_total], dim=1).T
    return log_pf.masked_fill_(ignored, 0.0), log_pterm, lse_parts.sum(0), lse_parts


@torch.library.custom_op("fastgfn::log_probs_from_logits_backward", mutates_args=())
def _backward(
    grad_log_pf: Tensor,
    grad_log_pterm: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse_parts: Tensor,
    stop: int | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    is_triton: bool,
) -> Tensor:
    """d logits (M, V), contiguous, in the dtype of `logits`."""
    options = (logit_bias, logit_scale, softcap, temperature)
    if is_triton:
        from fastgfn.kernels.log_probs import log_probs_bwd

        return log_probs_bwd(
            grad_log_pf, grad_log_pterm, grad_lse, logits, targets, lse_parts, stop, *options, ignore_index
        )
    grad = logits.new_empty(logits.shape)
    ignored = targets == ignore_index
    read = targets.masked_fill(ignored, 0).long()[:, None]
    own = grad_log_pf.masked_fill(ignored, 0.0)[:, None]
    if stop is not None:
        is_stop = read == stop
        read = torch.cat([read, torch.full_like(read, stop)], dim=1)
        own = torch.cat([own, grad_log_pterm[:, None]], dim=1)
    total = own.sum(1, keepdim=True)
    if stop is not None:
        own = torch.where(is_stop, total, own)
    rest = grad_lse[:, None] - total
    peak, log_total = lse_parts[:, :, None]
    for span in _chunks(logits):
        z, slope = _transform(logits[span], *options)
        z.sub_(peak[span]).sub_(log_total[span])
        log_p = z.gather(1, read[span])
        at_read = own[span] * -torch.expm1(log_p) + log_p.exp() * (rest[span] + own[span])
        z.exp_().mul_(rest[span]).scatter_(1, read[span], at_read)
        if slope is not None:
            z.mul_(slope)
        grad[span] = z.mul_(logit_scale / temperature)
    return grad


def _chunks(logits: Tensor) -> list[slice]:
    num_rows, vocab = logits.shape
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(a, min(a + step, num_rows)) for a in range(0, num_rows, step)]


def _transform(
    logits: Tensor, logit_bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """A transformed copy of the logits and, with a softcap, its derivative."""
    scale = logit_scale / (temperature if softcap is None else softcap)
    z, slope = logits.to(_compute_dtype(logits)) * scale, None
    if softcap is not None:
        z.tanh_()
        slope = 1.0 - z * z
        z.mul_(softcap / temperature)
    if logit_bias is not None:
        z.add_(logit_bias, alpha=1.0 / temperature)
    return z, slope


@_log_probs.register_fake
def _(logits, targets, stop, logit_bias, logit_scale, softcap, temperature, ignore_index, is_triton):
    num_rows = logits.shape[0]
    log_pf, lse = (logits.new_empty(num_rows, dtype=_compute_dtype(logits)) for _ in range(2))
    return log_pf, log_pf.new_empty(0 if stop is None else num_rows), lse, log_pf.new_empty(2, num_rows)


@_backward.register_fake
def _(
    grad_log_pf, grad_log_pterm, grad_lse, logits, targets, lse_parts, stop, logit_bias, logit_scale, softcap,
    temperature, ignore_index, is_triton,
):  # fmt: skip
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, targets, ctx.stop, logit_bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(logits, targets, output[3], logit_bias)


def _gradient(ctx, grad_log_pf, grad_log_pterm, grad_lse, grad_parts):
    logits, targets, lse_parts, logit_bias = ctx.saved_tensors
    grads = [g.contiguous() for g in (grad_log_pf, grad_log_pterm, grad_lse)]
    grad = torch.ops.fastgfn.log_probs_from_logits_backward(
        *grads, logits, targets, lse_parts, ctx.stop, logit_bias, *ctx.options
    )
    return grad, *[None] * 8


torch.library.register_autograd("fastgfn::log_probs_from_logits", _gradient, setup_context=_save)
