"""Plain truth for running sums along the tree and along ragged rows."""

import torch
from torch import Tensor


def tree_cumsum(values: Tensor, parent: Tensor) -> Tensor:
    """out[i] = values[i] + out[parent[i]]: the sum over the path from the root to i."""
    out = []
    for i, p in enumerate(parent.tolist()):
        out.append(values[i] if p < 0 else values[i] + out[p])
    return torch.stack(out) if out else values.clone()


def subtree_sum(values: Tensor, parent: Tensor) -> Tensor:
    """out[j] = values[j] + sum of out over the children of j."""
    out = list(values)
    for i in reversed(range(len(out))):
        p = int(parent[i])
        if p >= 0:
            out[p] = out[p] + out[i]
    return torch.stack(out) if out else values.clone()


def segment_cumsum(values: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:
    """cumsum within each row [offsets[n], offsets[n + 1])."""
    rows = values.split(offsets.diff().tolist())
    if reverse:
        return torch.cat([row.flip(0).cumsum(0).flip(0) for row in rows]) if rows else values.clone()
    return torch.cat([row.cumsum(0) for row in rows]) if rows else values.clone()
