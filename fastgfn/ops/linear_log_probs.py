"""Log-probabilities of the head without the (R, V) logits: the dispatcher op `fastgfn::linear_log_probs` and
its two backward ops. Equations: `reference/linear_log_probs.py`. Providers: `ops/head_tiles.py`, in torch,
and those of `ops/head.py`, in Triton.

What is read is a list of distinct (row, column) entries (`ops/head_entries.py`), so that several targets
share a row, the weight is read once per pass and every gradient sum has a fixed order.
"""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn.ops import head, head_entries, head_masks, head_tiles, head_trainable


def linear_log_probs(
    hidden: Tensor,  # (R, D) floating point, any strides
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor,  # (M,) int32 | int64
    rows: Tensor,  # (M,) int32 | int64
    *,
    termination_token_id: int | None,
    bias: Tensor | None,
    logit_bias: Tensor | None,  # (V,), or (2, V) with num_policy
    logit_scale: float,
    final_logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    provider: str | None = None,
    num_policy: int | None = None,
    allowed: Tensor | None = None,  # (U, ceil(V / 8)) uint8
    allowed_row: Tensor | None = None,  # (R,) int32 | int64
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_pf (M,), log_pterm (R,) or None, lse (R,); see `functional.log_probs.linear_log_probs`.

    provider: one of `head.PROVIDERS`; None follows the table there.
    num_policy: rows from there on take the second logit_bias and get no gradient (their outputs must not be
        used for one); None: all rows are alike.
    """
    num_rows, num_targets = hidden.shape[0], targets.shape[0]
    ignored = targets == ignore_index
    # An ignored target reads column 0: it gets no gradient, and S may hold a column too many.
    rows, columns = rows.long(), targets.masked_fill(ignored, 0).long()
    if termination_token_id is not None:
        every_row = torch.arange(num_rows, device=rows.device)
        rows = torch.cat([rows, every_row])
        columns = torch.cat([columns, torch.full_like(every_row, termination_token_id)])
    wants_grad = _wants_grad(hidden, weight, bias)
    save_row_grad = wants_grad and _is_frozen(weight, bias)
    function = "linear_log_probs" if num_policy is None else "policy_reward_log_probs"
    needs = {"wants_grad": wants_grad, "saves_grad": save_row_grad, "masked": allowed is not None}
    provider = head.choose_provider(function, provider, hidden, **needs)
    if provider == "tiles":
        rows, columns, slot = head_entries.by_column(rows, columns, num_rows)
    else:
        rows, columns, slot = head_entries.by_row(rows, columns, num_rows, weight.shape[0])
    log_p, lse, *_ = torch.ops.fastgfn.linear_log_probs(
        hidden, weight, bias, logit_bias, rows, columns, logit_scale, final_logit_softcap, temperature,
        save_row_grad, provider, num_policy, allowed, None if allowed_row is None else allowed_row.long(),
    )  # fmt: skip
    # Their gradients add in a fixed order: that of index_select on a CPU, that of indexing on a GPU.
    log_p = log_p.index_select(0, slot) if provider == "tiles" else log_p[slot]
    log_pf = log_p[:num_targets].masked_fill(ignored, 0.0)
    return log_pf, None if termination_token_id is None else log_p[num_targets:], lse


def _masks(allowed: Tensor | None, allowed_row: Tensor | None) -> head_masks.Masks:
    return None if allowed is None or allowed_row is None else (allowed, allowed_row)


def _is_frozen(weight: Tensor, bias: Tensor | None) -> bool:
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def _wants_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or not _is_frozen(weight, bias))


def policy_reward_log_probs(
    policy_hidden: Tensor,  # (R1, D)
    reward_hidden: Tensor,  # (R2, D)
    weight: Tensor,
    targets: tuple[Tensor, Tensor],  # (M1,), (M2,)
    rows: tuple[Tensor, Tensor],  # (M1,) in [0, R1), (M2,) in [0, R2)
    *,
    allowed_row: Tensor | None = None,  # (R1,)
    policy_logit_bias: Tensor | None,
    reward_logit_bias: Tensor | None,
    **options,  # of linear_log_probs
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """`linear_log_probs` of both streams in one pass over the head; the second without gradient."""
    num_policy, num_targets = policy_hidden.shape[0], targets[0].shape[0]
    if allowed_row is not None:
        allowed_row = torch.nn.functional.pad(allowed_row, (0, reward_hidden.shape[0]), value=-1)
    biases = (policy_logit_bias, reward_logit_bias)
    given = [b for b in biases if b is not None]
    log_pf, log_pterm, lse = linear_log_probs(
        torch.cat([policy_hidden, reward_hidden.detach()]),
        weight,
        torch.cat(targets),
        torch.cat([rows[0], rows[1] + num_policy]),
        logit_bias=torch.stack([torch.zeros_like(given[0]) if b is None else b for b in biases])
        if given
        else None,
        num_policy=num_policy,
        allowed_row=allowed_row,
        **options,
    )
    stops = (None, None)
    if log_pterm is not None:
        stops = (log_pterm[:num_policy], log_pterm[num_policy:].detach())
    policy = (log_pf[:num_targets], stops[0], lse[:num_policy])
    return [policy, (log_pf[num_targets:].detach(), stops[1], lse[num_policy:].detach())]


@torch.library.custom_op("fastgfn::linear_log_probs", mutates_args=())
def _linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,  # (V,) or (2, V)
    rows: Tensor,  # (E,) int64
    columns: Tensor,  # (E,) int64; distinct, sorted by (column, row) for "tiles", by row for others
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    save_row_grad: bool,
    provider: str = "tiles",
    num_policy: int | None = None,
    allowed: Tensor | None = None,  # (U, ceil(V / 8)) uint8
    allowed_row: Tensor | None = None,  # (R,) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p (E,), lse (R,), softcap' (E,), the parts of lse (2, R): maximum and rest, o or (0,).

    o is (R, D), or (num_policy, D). Where the row's mask forbids the entry, softcap' is 0.
    """
    scales = (logit_scale, softcap, temperature)
    graded = hidden.shape[0] if num_policy is None else num_policy
    options = (rows, columns, scales, save_row_grad, graded, _masks(allowed, allowed_row))
    if provider == "tiles":
        return head_tiles.forward(hidden, weight, bias, logit_bias, *options)
    return head.forward(provider, hidden, weight, bias, logit_bias, *options)


@torch.library.custom_op("fastgfn::linear_log_probs_frozen_backward", mutates_args=())
def _frozen_backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    row_grad: Tensor,
    factor: float,
    provider: str,
) -> Tensor:
    """d hidden (R, D) in the dtype of `weight`, from the saved o: no product over the vocabulary.

    Rows that o lacks have no upstream gradient.
    """
    run = head_tiles.frozen_backward if provider == "tiles" else head.frozen_backward
    return run(grad_log_p, grad_lse, weight, rows, columns, log_p, slope, row_grad, factor)


@torch.library.custom_op("fastgfn::linear_log_probs_backward", mutates_args=())
def _backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    lse_parts: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    num_policy: int | None,
    needs: list[bool],  # d hidden, d weight, d bias
    provider: str,
    allowed: Tensor | None = None,
    allowed_row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d hidden (R, D), d weight (V, D), d bias (V,), each (0,) if not needed; the logits are recomputed."""
    run = head_tiles.backward if provider == "tiles" else head_trainable.backward
    graded = hidden.shape[0] if num_policy is None else num_policy
    return run(
        grad_log_p, grad_lse, hidden, weight, bias, logit_bias, rows, columns, log_p, slope, lse_parts,
        (logit_scale, softcap, temperature), graded, needs, _masks(allowed, allowed_row),
    )  # fmt: skip


@_linear_log_probs.register_fake
def _(
    hidden, weight, bias, logit_bias, rows, columns, logit_scale, softcap, temperature, save_row_grad,
    provider="tiles", num_policy=None, allowed=None, allowed_row=None,
):  # fmt: skip
    (num_rows, width), num_entries = hidden.shape, rows.shape[0]
    row_grad = (num_rows if num_policy is None else num_policy, width) if save_row_grad else (0,)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shapes = ((num_entries,), (num_rows,), (num_entries,), (2, num_rows), row_grad)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@_frozen_backward.register_fake
def _(grad_log_p, grad_lse, weight, rows, columns, log_p, slope, row_grad, factor, provider):
    return weight.new_empty(grad_lse.shape[0], weight.shape[1])


@_backward.register_fake
def _(
    grad_log_p, grad_lse, hidden, weight, bias, logit_bias, rows, columns, log_p, slope,
    lse_parts, logit_scale, softcap, temperature, num_policy, needs, provider, allowed=None, allowed_row=None,
):  # fmt: skip
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx, inputs, output):
    hidden, weight, bias, logit_bias, rows, columns, *ctx.scales, ctx.has_row_grad = inputs[:10]
    ctx.provider, ctx.num_policy, *masks = inputs[10:]
    log_p, _, slope, lse_parts, row_grad = output
    ctx.mark_non_differentiable(slope, lse_parts, row_grad)
    if ctx.has_row_grad:
        ctx.save_for_backward(weight, rows, columns, log_p, slope, row_grad)
    else:
        call = (hidden, weight, bias, logit_bias, rows, columns)
        ctx.save_for_backward(*call, log_p, slope, lse_parts, *masks)


def _gradient(ctx, grad_log_p, grad_lse, *unused):
    if ctx.has_row_grad:
        factor = ctx.scales[0] / ctx.scales[2]
        grad = torch.ops.fastgfn.linear_log_probs_frozen_backward(
            grad_log_p, grad_lse, *ctx.saved_tensors, factor, ctx.provider
        )
        return grad, *[None] * 13
    needs = list(ctx.needs_input_grad[:3])
    *saved, allowed, allowed_row = ctx.saved_tensors
    options = (*ctx.scales, ctx.num_policy, needs, ctx.provider, allowed, allowed_row)
    grads = torch.ops.fastgfn.linear_log_probs_backward(grad_log_p, grad_lse, *saved, *options)
    return *[g if need else None for g, need in zip(grads, needs, strict=True)], *[None] * 11


torch.library.register_autograd("fastgfn::linear_log_probs", _gradient, setup_context=_save)
