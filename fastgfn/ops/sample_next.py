"""Exact next-token draws: the op `fastgfn::gumbel_draw` (CPU, csrc/sample_next.cpp) and its fake."""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401


def gumbel_draw(
    logits: Tensor,  # (R, V) float32 | float64
    rows: Tensor,  # (K,) int64
    temperature: Tensor,  # (K,) float32
    trajectory: Tensor,  # (K,) int64
    position: Tensor,  # (K,) int64
    seed: int,
    termination_token_id: int,
    forbid_stop: Tensor,  # (K,) bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token, log_pf, log_pterm, log_behavior), each (K,): see reference.sample_next.gumbel_draw.

    termination_token_id -1 means that no token stops; log_pterm is then -inf.
    """
    return torch.ops.fastgfn.gumbel_draw(
        logits, rows, temperature, trajectory, position, seed, termination_token_id, forbid_stop
    )


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """(K, 4) int64 words in [0, 2^32) of (K, 4) counters, the noise of gumbel_draw.

    Token v reads word v % 4 of the counter (v // 4, position, low half, high half of trajectory).
    """
    return torch.ops.fastgfn.philox4x32(counter, seed)


@torch.library.register_fake("fastgfn::philox4x32")
def _(counter, seed):
    return torch.empty_like(counter, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastgfn::gumbel_draw")
def _(logits, rows, temperature, trajectory, position, seed, termination_token_id, forbid_stop):
    log_prob = logits.new_empty(rows.shape[0])
    return rows.new_empty(rows.shape[0]), log_prob, torch.empty_like(log_prob), torch.empty_like(log_prob)
