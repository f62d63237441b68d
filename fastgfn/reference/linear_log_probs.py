"""Plain truth of `linear_log_probs`, and the derivation of the gradient that the op uses.

With x = logit_scale (hidden W^T + bias), the logits are z = (softcap(x) + logit_bias) / temperature, where
softcap(x) = c tanh(x / c), and log p = z - lse(z). Let S be the set of distinct columns that are read from a
row (its targets and the stop token), g_v the summed upstream gradient of log p_v, G = sum_{v in S} g_v, l the
upstream gradient of lse, and s_v = softcap'(x_v) (1 without a softcap). Then dL/dz_v = g_v - (G - l) p_v, so

    dL/dx_v = (s_v / temperature) (g_v (1 - p_v) - p_v (G - g_v) + l p_v)      v in S
    dL/dx_v = (s_v / temperature) (-(G - l) p_v)                               v not in S

The form for S does not cancel when p_v is close to 1, with 1 - p_v = -expm1(log p_v). With a frozen head only
dL/dhidden = logit_scale sum_v dL/dx_v W_v is needed, and its sum over v not in S is -(G - l) / temperature
times o = sum_{v not in S} p_v s_v W_v, which the forward pass can form before g and l are known.
"""

import torch
from torch import Tensor


def linear_log_probs(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,)
    *,
    rows: Tensor | None = None,  # (M,)
    termination_token_id: int | None = None,
    bias: Tensor | None = None,  # (V,)
    logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float = 1.0,
    allowed: Tensor | None = None,  # (U, ceil(V / 8)) uint8
    allowed_row: Tensor | None = None,  # (R,)
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_pf (M,), log_pterm (R,) or None, and lse (R,), in the dtype of `hidden`, from all (R, V) logits."""
    logits = logit_scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    if final_logit_softcap is not None:
        logits = final_logit_softcap * torch.tanh(logits / final_logit_softcap)
    logits = (logits + (0.0 if logit_bias is None else logit_bias)) / temperature
    if allowed is not None:
        bits = (allowed[:, :, None] >> torch.arange(8, device=allowed.device)) & 1
        forbidden = (bits.flatten(1)[:, : weight.shape[0]] == 0)[allowed_row] & (allowed_row >= 0)[:, None]
        logits = logits.masked_fill(forbidden, -torch.inf)
    log_p = logits.log_softmax(dim=1)
    rows = torch.arange(hidden.shape[0], device=hidden.device) if rows is None else rows
    ignored = targets == ignore_index
    log_pf = log_p[rows, targets.masked_fill(ignored, 0)].masked_fill(ignored, 0.0)
    log_pterm = None if termination_token_id is None else log_p[:, termination_token_id]
    return log_pf, log_pterm, logits.logsumexp(dim=1)


def policy_reward_log_probs(
    policy_hidden: Tensor,  # (R1, D)
    reward_hidden: Tensor,  # (R2, D)
    weight: Tensor,  # (V, D)
    targets: tuple[Tensor, Tensor],  # (M1,), (M2,)
    *,
    rows: tuple[Tensor, Tensor],  # (M1,), (M2,)
    policy_logit_bias: Tensor | None = None,  # (V,)
    reward_logit_bias: Tensor | None = None,  # (V,)
    allowed: Tensor | None = None,
    allowed_row: Tensor | None = None,
    **options,  # of linear_log_probs
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """`linear_log_probs` of the policy's and of the reward model's rows, the second without gradient."""
    policy = linear_log_probs(
        policy_hidden, weight, targets[0], rows=rows[0], logit_bias=policy_logit_bias,
        allowed=allowed, allowed_row=allowed_row, **options,
    )  # fmt: skip
    with torch.no_grad():
        reward = linear_log_probs(
            reward_hidden, weight, targets[1], rows=rows[1], logit_bias=reward_logit_bias, **options
        )
    return [policy, reward]
