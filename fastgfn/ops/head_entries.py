"""The entries of a head's call: the distinct (row, column) pairs whose log-probability is read.

Sorted by column they are distinct, and counted on the host (one synchronisation on CUDA). Sorted by row there
are as many as there are pairs: the repeated ones come last, in a row that does not exist.
"""

import torch
from torch import Tensor


def by_column(rows: Tensor, columns: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows and columns (E,) of the entries, and the entry (M,) of every pair."""
    entries, slot = (columns * num_rows + rows).unique(return_inverse=True)
    return entries % max(num_rows, 1), entries // max(num_rows, 1), slot


def by_row(rows: Tensor, columns: Tensor, num_rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows (M,) ascending, num_rows after the distinct entries, columns (M,), and the entry of every pair."""
    key, order = (rows * vocab + columns).sort()
    is_first = torch.cat([key[:1] == key[:1], key[1:] != key[:-1]])
    place = is_first.cumsum(0) - 1
    entries = torch.full_like(key, num_rows * vocab).scatter_(0, place, key)
    return entries // vocab, entries % vocab, torch.empty_like(order).scatter_(0, order, place)
