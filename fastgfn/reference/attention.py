"""Plain truth of tree and path attention: one query at a time over its ancestors."""

import torch
from torch import Tensor


def tree_attention(
    query: Tensor,  # (H, T, d)
    key: Tensor,  # (Hkv, T, d)
    value: Tensor,  # (Hkv, T, d)
    end: Tensor,  # (T,)
    position: Tensor,  # (T,)
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(H, T, d); i sees j when j <= i < end[j] and position[i] - position[j] < window."""
    repeat = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    rows = []
    for i in range(query.shape[1]):
        seen = [
            j
            for j in range(i + 1)
            if i < int(end[j]) and (window is None or int(position[i] - position[j]) < window)
        ]
        scores = torch.einsum("hd,hjd->hj", query[:, i], key[:, seen]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hj,hjd->hd", scores.softmax(-1), value[:, seen]))
    return torch.stack(rows, dim=1) if rows else query.new_zeros(query.shape)


def path_attention(
    query: Tensor,  # (n, H, d)
    keys: Tensor,  # (C, Hkv, d)
    values: Tensor,  # (C, Hkv, d)
    path: Tensor,  # (n, W)
    length: Tensor,  # (n,)
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(n, H, d); query n sees the last `window` of the nodes path[n, :length[n]]."""
    repeat = query.shape[1] // keys.shape[1]
    rows = []
    for q, nodes, count in zip(query, path, length, strict=True):
        seen = nodes[: int(count)].long()
        seen = seen if window is None else seen[-window:]
        k, v = (x[seen].repeat_interleave(repeat, 1) for x in (keys, values))
        scores = torch.einsum("hd,nhd->hn", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(rows) if rows else query.new_zeros(query.shape)
