"""Path attention, `fastgfn::path_attention`: decoded tokens over their paths in a pool of keys and values.

A pool holds one row of keys and values per node of a growing token tree. Tokens that share a prefix share its
nodes, so nothing is copied when samples part, and a node that no sample needs any more is used again. CPU:
csrc/path_attention.cpp. CUDA: Triton, kernels/path_attention.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn import checks


class SharedPrompts(NamedTuple):
    """Rows that begin with the same nodes, so that a GPU reads these once per tile of rows.

    CUDA graphs may hold the tensors: empty tiles cost next to nothing.
    """

    tiles: Tensor  # (T, R) int32, rows with one prompt, each row in one tile at most, then -1
    depth: Tensor  # (n,) int64, nodes of the prompt that row n shares with its tile, 0 of a row in none


def path_attention(
    query: Tensor,  # (n, H, d)
    keys: Tensor,  # (C, Hkv, d) contiguous, same dtype
    values: Tensor,  # (C, Hkv, d)
    path: Tensor,  # (n, W) int32
    length: Tensor,  # (n,) int64, in [1, W]
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    shared: SharedPrompts | None = None,
) -> Tensor:
    """(n, H, d): query n attends to the nodes path[n, :length[n]], root first, itself last; no gradient.

    window: only the last `window` nodes. shared: what to read once; the result is the same within rounding.
    Sums in float32, in float64 for such inputs, which CUDA refuses; the bits of a row do not depend on the
    others, on CUDA of a row in no tile. On CUDA lengths, nodes and tiles are not checked.
    """
    softcap = 0.0 if softcap is None else softcap
    tiles, depth = (None, None) if shared is None else shared
    return torch.ops.fastgfn.path_attention(
        query, keys, values, path, length, scale, softcap, window or 0, tiles, depth
    )


def path_attention_triton(query, keys, values, path, length, scale, softcap, window, tiles=None, depth=None):
    from fastgfn.kernels import path_attention as kernels

    if query.dtype == torch.float64:
        have, fix = query.dtype, "cast the model to float32"
        checks.fail("path_attention", "query", "below float64 on CUDA", have, fix, kind=checks.InputTypeError)
    query, path = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, path))
    if tiles is not None:
        tiles, depth = tiles.contiguous(), depth.contiguous()
    return kernels.path_attention(
        query, keys, values, path, length.contiguous(), scale, softcap, window, tiles, depth
    )


torch.library.impl("fastgfn::path_attention", "cuda", path_attention_triton)


@torch.library.register_fake("fastgfn::path_attention")
def _(query, keys, values, path, length, scale, softcap, window, tiles=None, depth=None):
    return query.new_empty(query.shape)
