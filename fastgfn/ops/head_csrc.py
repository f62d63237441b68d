"""The C++ pass of `fastgfn::linear_log_probs` (csrc/head.cpp), for bfloat16 on CPU, and where it runs.

torch can multiply bfloat16 only into bfloat16, whose rounding log-probs would show; oneDNN's block product
sums in float32, on CPUs with AVX512_BF16 or AMX.
"""

import functools

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401


def uses_csrc(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the C++ pass serves a head: bfloat16 rows of even width, where `csrc_runs`.

    Not without rows: an empty tensor counts as contiguous whatever its strides are.
    """
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == weight.dtype == torch.bfloat16
        and hidden.numel() > 0
        and hidden.shape[1] % 2 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 2 == 0
        and weight.data_ptr() % 4 == 0
        and csrc_runs()
    )


def csrc_runs() -> bool:
    """Whether oneDNN is switched on and multiplies blocks of bfloat16 here."""
    return torch.backends.mkldnn.enabled and _probe_brgemm()


@functools.cache
def _probe_brgemm() -> bool:
    """Whether one block product runs: torch knows the CPU's instructions, but not ONEDNN_MAX_CPU_ISA."""
    x = torch.zeros(1, 2, dtype=torch.bfloat16, device="cpu")
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    try:
        torch.ops.fastgfn.head_forward(x, x, None, None, none, none, 1.0, 0.0, False)
    except RuntimeError:
        return False
    return True


def rest_by_csrc(
    hidden, weight, bias, logit_bias, rows, columns, scales, save_row_grad, graded
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_log_probs._rest_by_tiles`: a pass for the graded rows, one without gradient for the others."""
    logit_scale, softcap, temperature = scales
    scale = logit_scale / (temperature if softcap is None else softcap)
    bias = None if bias is None else bias.float() * scale
    masks = (None, None)
    if logit_bias is not None:
        masks = (logit_bias.float() / temperature).expand(2, -1)
    logits, slope = (hidden.new_empty(rows.shape, dtype=torch.float32) for _ in range(2))
    parts = []
    for first, last, mask in ((0, graded, masks[0]), (graded, hidden.shape[0], masks[1])):
        if first == last:
            continue
        own = ((rows >= first) & (rows < last)).nonzero()[:, 0]
        logits[own], slope[own], *part = torch.ops.fastgfn.head_forward(
            hidden[first:last].contiguous(),
            weight,
            bias,
            mask,
            rows[own] - first,
            columns[own],
            scale,
            0.0 if softcap is None else softcap / temperature,
            save_row_grad and first < graded,
        )
        parts.append(part)
    peak, total = (torch.cat([part[i] for part in parts]) for i in range(2))
    row_grad = parts[0][2] if graded else hidden.new_zeros((0, hidden.shape[1]), dtype=torch.float32)
    return logits, slope, peak, total, row_grad if save_row_grad else row_grad.new_empty(0)


@torch.library.register_fake("fastgfn::head_forward")
def _(hidden, weight, bias, logit_bias, rows, columns, scale, softcap, want_grad):
    def floats(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    entries, num_rows = rows.shape[0], hidden.shape[0]
    row_grad = floats(*hidden.shape) if want_grad else floats(0)
    total = hidden.new_empty(num_rows, dtype=torch.float64)
    return floats(entries), floats(entries), floats(num_rows), total, row_grad
