"""Decode-state bookkeeping: the op `fastgfn::decode_update_` (csrc/decode.cpp, csrc/cuda/decode.cu)."""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401


def decode_update_(
    tokens: Tensor,  # (N, L) int64, written
    lengths: Tensor,  # (N,) int64, written
    finished: Tensor,  # (N,) bool, written
    drawn: Tensor,  # (A,) int64
    rows: Tensor,  # (A,) int64, distinct and unfinished
    termination_token_id: int,
    max_length: int,
) -> None:
    """Append drawn[a] to row rows[a], or finish the row if it stops or is then max_length long.

    The CPU refuses finished, full, repeated and unknown rows before it writes. CUDA cannot look without a
    synchronisation: it leaves finished, full and unknown rows as they are, so that a graph may pass every row
    in every step; repeated rows are undefined there.
    """
    torch.ops.fastgfn.decode_update_(tokens, lengths, finished, drawn, rows, termination_token_id, max_length)


@torch.library.register_fake("fastgfn::decode_update_")
def _(tokens, lengths, finished, drawn, rows, termination_token_id, max_length):
    return None
