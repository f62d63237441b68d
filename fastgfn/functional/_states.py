"""What the padded losses over prefixes share: states that may not stop, the anchor, interpolated rewards."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn import checks
from fastgfn.functional import _rows
from fastgfn.functional._rows import Reduction


def check_anchor(function: str, states: Tensor, terminable: Tensor | None, log_z: Tensor | None) -> None:
    """states: any (N, T + 1) of them."""
    if terminable is None:
        fix = "it is the value of an s_0 that cannot stop, which `terminable` tells"
        checks.check(log_z is None, function, "log_z", "None without terminable", "a value", fix)
        return
    check_mask(function, states, terminable)


def check_mask(function: str, states: Tensor, terminable: Tensor) -> None:
    if terminable.dtype != torch.bool:
        fix = "pass the mask of the states that may stop"
        checks.fail(function, "terminable", "bool", terminable.dtype, fix, kind=checks.InputTypeError)
    fix = "pass one column per state, one more than log_pf"
    checks.check_shape(function, "terminable", terminable, tuple(states.shape), fix)
    checks.check_same_device(function, log_pf=states, terminable=terminable)


def paths(log_pf: Tensor, lengths: Tensor) -> Tensor:
    """(N, T + 1) float64 log-probability of reaching every state; past the end, that of the last."""
    is_step, _ = _rows.masks(lengths, log_pf.shape[1])
    return pad(torch.where(is_step, log_pf, 0).double().cumsum(1), (1, 0))


def last(states: Tensor, lengths: Tensor) -> Tensor:
    """(N,) entry of every row's last state."""
    return states.gather(1, lengths.long().clamp(0, states.shape[1] - 1)[:, None])[:, 0]


def anchor(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, terminable: Tensor | None, options: Reduction
) -> Tensor:
    """(N,) float64 detached mean of log R(x) - log q(x) over the row's group."""
    delta = last(log_flow, lengths).detach().double() - last(paths(log_pf.detach(), lengths), lengths)
    used = torch.ones_like(delta, dtype=torch.bool) if terminable is None else last(terminable, lengths)
    return _rows.group_mean(delta, used, options)


def compacted(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, terminable: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of s_0 and the states that may stop, a transition being all the tokens between two of them.

    Where s_0 may not stop its flow is log_z.
    """
    _, is_state = _rows.masks(lengths, log_pf.shape[1])
    keep = terminable & is_state
    root = torch.where(keep[:, 0], log_flow[:, 0], log_z.to(log_flow))
    log_flow = torch.cat([root[:, None], log_flow[:, 1:]], 1)
    keep = torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:]], 1)
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    steps = paths(log_pf, lengths).gather(1, order).diff(dim=1)
    return steps.to(log_pf.dtype), log_flow.gather(1, order), keep.sum(1) - 1


def interpolated(log_reward: Tensor, lengths: Tensor, segment: int, terminable: Tensor | None) -> Tensor:
    """`interpolated_log_reward`, checked already; 0 on padding and where a state may not stop."""
    _, valid = _rows.masks(lengths, log_reward.shape[1] - 1)
    valid = valid if terminable is None else valid & terminable
    column = torch.arange(log_reward.shape[1], device=log_reward.device)[None]
    first, last = valid.cumsum(1) == 1, valid.flip(1).cumsum(1).flip(1) == 1
    is_knot = valid & ((column % segment == 0) | first | last)
    before = torch.where(is_knot, column, 0).cummax(1).values
    after = torch.where(is_knot, column, column.shape[1] - 1).flip(1).cummin(1).values.flip(1)
    share = (column - before).double() / (after - before).clamp(min=1)
    known = torch.where(is_knot, log_reward, 0).double()
    value = torch.lerp(known.gather(1, before), known.gather(1, after), share)
    return torch.where(valid, value, 0).to(log_reward.dtype)
