"""Plain truth for next-token draws: Philox4x32-10 noise and the Gumbel argmax."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al. 2011) on (..., 4) counters, as int64 in [0, 2^32).

    The 64-bit products wrap in int64, which keeps their bits; `>> 32` needs the mask as it extends the sign.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(10):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def noise_words(seed: int, trajectory: Tensor, position: Tensor, vocab: int) -> Tensor:
    """(K, V) words: token v reads word v % 4 of the counter (v // 4, position, trajectory), key = seed."""
    blocks = torch.arange((vocab + 3) // 4)
    columns = (blocks[None], position[:, None], trajectory[:, None] & MASK, trajectory[:, None] >> 32 & MASK)
    counter = torch.stack(torch.broadcast_tensors(*columns), -1)
    return philox4x32(counter, seed).flatten(1)[:, :vocab]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float64: -log(E) of the exponential E = -log(1 - u), u = (word + 0.5) / 2^32."""
    return -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))


def gumbel_draw(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    trajectory: Tensor,
    position: Tensor,
    seed: int,
    termination_token_id: int,
    forbid_stop: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw token = argmax_v logits[v] / temperature + gumbel(v): a sample of softmax(logits / temperature).

    log_pf and log_pterm read log_softmax(logits) at the token and at the stop token, log_behavior reads
    log_softmax(logits / temperature) at the token; where forbid_stop, the stop token's logit is -inf.
    """
    z = logits.double()[rows]
    stop = termination_token_id
    if stop >= 0:
        z[:, stop] = z[:, stop].masked_fill(forbid_stop, -torch.inf)
    tempered = z / temperature.double()[:, None]
    noise = gumbel(noise_words(seed, trajectory, position, z.shape[1]))
    token = (tempered + noise).argmax(1)
    log_q = z.log_softmax(1)
    log_pf = log_q.gather(1, token[:, None])[:, 0]
    log_pterm = log_q[:, stop] if stop >= 0 else torch.full_like(log_pf, -torch.inf)
    log_behavior = tempered.log_softmax(1).gather(1, token[:, None])[:, 0]
    return token, *(x.to(logits.dtype) for x in (log_pf, log_pterm, log_behavior))


def head_gumbel_draw(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    logit_bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    rows: Tensor,
    temperature: Tensor,
    trajectory: Tensor,
    position: Tensor,
    seed: Tensor,  # (1,)
    termination_token_id: int,
    forbid_stop: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gumbel_draw of softcap(logit_scale * (hidden weight.T + bias)) + logit_bias."""
    logits = logit_scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + (0.0 if logit_bias is None else logit_bias)
    draws = (rows, temperature, trajectory, position, int(seed), termination_token_id, forbid_stop)
    return gumbel_draw(logits, *draws)


def kept_tokens(
    p: list[float], top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> set[int]:
    """The tokens that the filters leave of one softmax, by a loop over the sorted probabilities."""
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))[:top_k]
    total, kept, mass = sum(p[v] for v in order), [], 0.0
    for v in order:
        if top_p is None or not kept or mass / total < top_p:
            kept.append(v)
            mass += p[v]
    return {v for v in kept if min_p is None or p[v] >= min_p * p[order[0]]}
