"""Plain truth for the bookkeeping of one decoding step."""

from torch import Tensor


def decode_update_(
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    drawn: Tensor,
    rows: Tensor,
    termination_token_id: int,
    max_length: int,
) -> None:
    """Append drawn[a] to row rows[a], or finish the row if it stops or is then max_length long."""
    for token, i in zip(drawn.tolist(), rows.tolist(), strict=True):
        if token == termination_token_id:
            finished[i] = True
            continue
        tokens[i, lengths[i]] = token
        lengths[i] += 1
        if lengths[i] == max_length:
            finished[i] = True
