"""The Triton providers of `fastgfn::linear_log_probs` (kernels/head.py, kernels/head_fused.py), and the table
that chooses one.

    tiles            torch, one vocabulary tile at a time: any device and dtype
    row_pass         chunks of rows: product with float32 output, one row kernel, product P' W
    row_pass_narrow  the same with logits rounded to the input's dtype: 6 bytes per logit instead of 10, but
                     errors of up to 2^-9 of a logit, which lse and P' inherit; for a frozen head
    fused            lse and logits only, nothing of size V in memory: no gradient of a frozen head, no masks
                     of rows
"""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.head_masks import Masks, forbid_, forbidden_entries
from fastgfn.ops.log_probs_from_logits import triton_runs_on

PROVIDERS = ("tiles", "row_pass", "row_pass_narrow", "fused")
# The default on CUDA by (16-bit input, a gradient is wanted). cuBLAS is the faster float32 product.
TABLE = {
    (True, True): "row_pass",
    (True, False): "fused",
    (False, True): "row_pass",
    (False, False): "row_pass",
}
# Logits of one chunk of rows: 1024 rows of float32 at V = 128256. Fewer than 200 rows would read W too often.
CHUNK_BYTES = 512 * 2**20
ROW_MULTIPLE = 128
VOCAB_MULTIPLE = 128
# P' of a confident row would underflow in float16; a power of two is exact.
FLOAT16_SCALE = 2.0**14
# Programs at once in the interpreter; enough to cut a small vocabulary.
INTERPRETED_PROGRAMS = 3


def choose_provider(
    function: str,
    provider: str | None,
    hidden: Tensor,
    *,
    wants_grad: bool,
    saves_grad: bool,
    masked: bool = False,
) -> str:
    """The provider that serves a call, or an error; None follows the table.

    wants_grad: any argument does. saves_grad: the forward pass is to form the gradient of a frozen head.
    masked: rows have masks of their own.
    """
    device, is_double = hidden.device.type, hidden.dtype == torch.float64
    if provider is None:
        if device == "cpu" or is_double or not triton_runs_on(device):
            return "tiles"
        return "row_pass" if masked else TABLE[hidden.element_size() == 2, wants_grad]
    known = "None or one of " + ", ".join(repr(p) for p in PROVIDERS)
    checks.check(provider in PROVIDERS, function, "provider", known, repr(provider), "pass None")
    if provider != "tiles" and (is_double or not triton_runs_on(device)):
        have = f"{provider!r} with {hidden.dtype} on {device}"
        fix = "Triton needs CUDA tensors below float64, or TRITON_INTERPRET=1"
        checks.fail(function, "provider", "None or 'tiles' here", have, fix, kind=RuntimeError)
    if provider == "fused" and saves_grad:
        fix = "pass None, or call it under torch.no_grad()"
        want = "one that forms the gradient of hidden"
        checks.fail(function, "provider", want, "'fused'", fix, kind=RuntimeError)
    if provider == "fused" and masked:
        fix, want = "pass None", "one that masks rows"
        checks.fail(function, "provider", want, "'fused'", fix, kind=RuntimeError)
    if provider == "row_pass_narrow" and hidden.element_size() == 2 and wants_grad and not saves_grad:
        # its backward would set logits made again, unrounded, against the lse of rounded ones
        want, fix = "one that keeps float32 logits for a trainable head", "pass None"
        checks.fail(function, "provider", want, "'row_pass_narrow'", fix, kind=RuntimeError)
    return provider


def forward(
    provider: str,
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    logit_bias: Tensor | None,  # (V,) or (2, V)
    rows: Tensor,  # (E,) ascending
    columns: Tensor,  # (E,)
    scales: tuple[float, float | None, float],
    save_row_grad: bool,
    num_policy: int,
    row_masks: Masks = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `fastgfn::linear_log_probs`; log p is NaN for an entry out of range."""
    from fastgfn.kernels import head, head_fused

    vocab = weight.shape[0]
    masks = None if logit_bias is None else logit_bias.float().reshape(-1, vocab).contiguous()
    bias = None if bias is None else bias.contiguous()
    logits, slope = head.entry_logits(hidden, weight, bias, masks, rows, columns, num_policy, scales)
    if row_masks is not None:
        forbidden = forbidden_entries(row_masks, rows, columns)
        # added: NaN stays
        logits, slope = logits + torch.where(forbidden, -torch.inf, 0.0), slope.masked_fill(forbidden, 0.0)
    row_grad = logits.new_empty(0)
    if provider == "fused":
        num_programs = INTERPRETED_PROGRAMS
        if hidden.is_cuda:
            num_programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
        lse_parts = head_fused.fused_parts(hidden, weight, bias, masks, num_policy, scales, num_programs)
    else:
        entries = (_starts(rows, hidden.shape[0]), columns, logits)
        dtype = hidden.dtype if provider == "row_pass_narrow" else torch.float32
        if save_row_grad:
            row_grad = logits.new_empty(num_policy, hidden.shape[1])
        lse_parts = _row_pass(
            dtype, hidden, weight, bias, masks, row_masks, entries, num_policy, row_grad, scales
        )
    peak, log_total = lse_parts
    own = rows.clamp(0, hidden.shape[0] - 1)
    log_p = (logits - peak[own]) - log_total[own]
    if provider == "fused":
        # The two float32 sums of one logit differ in their order, which could leave log p at 1e-6 above 0.
        log_p.clamp_(max=0.0)
    return log_p, lse_parts.sum(0), slope, lse_parts, row_grad


def frozen_backward(
    grad_log_p: Tensor,  # (E,)
    grad_lse: Tensor,  # (R,)
    weight: Tensor,
    rows: Tensor,  # (E,) ascending
    columns: Tensor,
    log_p: Tensor,
    slope: Tensor,
    row_grad: Tensor,  # (R or num_policy, D)
    factor: float,
) -> Tensor:
    """d hidden (R, D); entries out of range and rows that o lacks add nothing."""
    from fastgfn.kernels.head_backward import frozen_head_backward

    starts = _starts(rows, grad_lse.shape[0])
    upstream = (grad_log_p.contiguous(), grad_lse.contiguous())
    return frozen_head_backward(*upstream, weight, starts, columns, log_p, slope, row_grad, factor)


def _starts(rows: Tensor, num_rows: int) -> Tensor:
    return torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))


def _row_pass(
    dtype: torch.dtype,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    row_masks: Masks,
    entries: tuple[Tensor, Tensor, Tensor],
    num_policy: int,
    row_grad: Tensor,  # o of the first rows, written
    scales: tuple[float, float | None, float],
) -> Tensor:
    """lse_parts (2, R), from logits of type dtype."""
    from fastgfn.kernels import head

    num_rows, vocab, num_grad_rows = hidden.shape[0], weight.shape[0], row_grad.shape[0]
    padded = -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    step = chunk_rows(num_rows, padded * dtype.itemsize)
    lse_parts = torch.empty(2, num_rows, dtype=torch.float32, device=hidden.device)
    logits = hidden.new_empty(step, padded, dtype=dtype)
    # 16-bit P' goes over the upper half of a row of float32 logits, all of P' over logits of its own dtype.
    p = logits if dtype == hidden.dtype else logits.view(hidden.dtype)[:, padded:]
    p_scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        mm(hidden[first : first + count], weight.T, logits[:count, :vocab])
        # products of -inf are dead to the kernel
        forbid_(logits[:count, :vocab], row_masks, slice(0, vocab), slice(first, first + count))
        head.row_pass(
            logits[:count],
            p[:count],
            bias,
            masks,
            entries,
            lse_parts,
            first,
            num_policy,
            num_grad_rows,
            vocab,
            scales,
            p_scale,
        )
        graded = min(count, num_grad_rows - first)
        if graded > 0:
            mm(p[:graded, :vocab], weight, row_grad[first : first + graded])
    if p_scale != 1.0:
        row_grad.div_(p_scale)
    return lse_parts


def chunk_rows(num_rows: int, row_bytes: int) -> int:
    """Rows of one chunk: within CHUNK_BYTES, balanced, a multiple of ROW_MULTIPLE where there are as many."""
    most = max(1, CHUNK_BYTES // row_bytes)
    if most >= ROW_MULTIPLE:
        most -= most % ROW_MULTIPLE
    step = -(-num_rows // max(1, -(-num_rows // most)))
    return max(1, min(most, num_rows, -(-step // ROW_MULTIPLE) * ROW_MULTIPLE))


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in float32; out has the dtype of a and b, or is float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
