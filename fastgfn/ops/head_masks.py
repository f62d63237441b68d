"""Masks of the head's rows: which columns each may choose, U distinct sets in packed bits.

bits (U, ceil(V / 8)) uint8, of column v bit v % 8 of byte v // 8; mask (R,) int64, which set is a row's, -1
for all columns. Only spans of the vocabulary, or entries, are ever unpacked, into 2.5 bytes per logit of the
span.
"""

import functools

import torch
from torch import Tensor

Masks = tuple[Tensor, Tensor] | None


def forbid_(z: Tensor, masks: Masks, span: slice, rows: slice = slice(None)) -> Tensor:
    """z (rows of `rows`, width of the span) with -inf, in place, where a row may not choose the column."""
    if masks is None:
        return z
    bits, mask = masks[0], masks[1][rows]
    own = bits[:, span.start // 8 : -(-span.stop // 8)][mask.clamp(min=0)].int()
    own.masked_fill_((mask < 0)[:, None], 255)
    forbidden = _forbidden(z.device)[own].view(torch.bool)
    return z.masked_fill_(forbidden[:, span.start % 8 :][:, : z.shape[1]], -torch.inf)


@functools.cache
def _forbidden(device: torch.device) -> Tensor:
    """(256,) int64: for every byte, eight bool that are True where its bits are 0."""
    places = torch.arange(8, device=device)
    return (torch.arange(256, device=device)[:, None] >> places & 1).eq(0).view(torch.int64)[:, 0]


def forbidden_entries(masks: tuple[Tensor, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """(E,) bool, the row may not choose the column; rows past the end take any."""
    bits, mask = masks
    own = torch.nn.functional.pad(mask, (0, 1), value=-1)[rows.clamp(0, len(mask))]
    at = columns.clamp(0, 8 * bits.shape[1] - 1)
    return ((bits[own.clamp(min=0), at >> 3] >> (at & 7).byte()) & 1).eq(0) & (own >= 0)
