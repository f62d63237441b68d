"""Plain truth for the elementwise work of a decoding step: norms, rotary positions, gates.

Zhang & Sennrich, 2019 (RMSNorm); Su et al., 2021 (rotary positions, in the halves of GPT-NeoX); Shazeer, 2020
(SwiGLU).
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""
    return weight * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, h, d), whose halves a, b become a cos - b sin, b cos + a sin; cos and sin (n, d)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def rope_write(
    row: Tensor,
    cos: Tensor,
    sin: Tensor,
    nodes: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries (n, H, d), keys, values) from rows (n, (H + 2 Hkv) d): the pools with the nodes written."""
    kv_heads, width = keys.shape[1:]
    heads = row.shape[1] // width - 2 * kv_heads
    q, k, v = row.view(len(row), heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (rms_norm(x, weight, eps) for x, weight in zip((q, k), norms, strict=True))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, keys.index_copy(0, nodes, k), values.index_copy(0, nodes, v)


def silu_mul_row(row: Tensor) -> Tensor:
    """silu(gate) * up (n, F) from rows (n, 2 F) of gates, then ups."""
    gate, up = row.chunk(2, -1)
    return gate * gate.sigmoid() * up
