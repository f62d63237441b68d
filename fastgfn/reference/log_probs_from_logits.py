"""Plain truth of `log_probs_from_logits`; its gradient is the dL/dx of `reference/linear_log_probs.py`."""

import torch
from torch import Tensor


def log_probs_from_logits(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    *,
    termination_token_id: int | None = None,
    logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_pf (M,), log_pterm (M,) or None, and lse (M,), in the dtype of `logits`."""
    logits = logit_scale * logits
    if final_logit_softcap is not None:
        logits = final_logit_softcap * torch.tanh(logits / final_logit_softcap)
    logits = (logits + (0.0 if logit_bias is None else logit_bias)) / temperature
    log_p = logits.log_softmax(dim=1)
    ignored = targets == ignore_index
    log_pf = log_p.gather(1, targets.masked_fill(ignored, 0).long()[:, None])[:, 0].masked_fill(ignored, 0.0)
    log_pterm = None if termination_token_id is None else log_p[:, termination_token_id]
    return log_pf, log_pterm, logits.logsumexp(dim=1)
