"""Sub-trajectory balance: the dispatcher ops `fastgfn::subtb_padded`, `subtb_tree`, `subtb_tree_pairs`
(csrc/subtb.cpp, csrc/cuda/), which take O(T) time and memory and accumulate in double, and `subtb_pairwise`,
the quadratic torch path of the losses other than the square. Equations: `reference/subtb.py`.
"""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn.ops.residual import value_and_slope

# Float64 elements of one (rows, starts, states) tile of the pairwise path: 1 MiB was the fastest on CPU.
TILE_ELEMENTS = 2**17


def subtb_padded(
    log_pf: Tensor,  # (N, T) float32 | float64, any strides
    log_flow: Tensor,  # (N, T + 1) same dtype
    lengths: Tensor,  # (N,) int32 | int64, in [0, T]
    subtb_lambda: float,
) -> tuple[Tensor, Tensor]:
    """(N,) weighted sum of squared window residuals and (N,) sum of window weights, of every padded row.

    Differentiable in log_pf and log_flow through the first output; padding is never read, its gradient is 0.
    On CUDA a length out of range makes its row NaN (refusing it would need a synchronisation).
    """
    return torch.ops.fastgfn.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)


def subtb_tree(
    log_pf: Tensor,  # (T,) float32 | float64, of the edge into the node
    log_flow: Tensor,  # (T,) same dtype, not read where valid is False
    parent: Tensor,  # (T,) int32 | int64, depth-first, -1 at a root
    valid: Tensor,  # (T,) bool, the nodes that start and end windows
    weight: Tensor,  # (T,) floating point, >= 0, of the windows that end at the node; no gradient
    subtb_lambda: float,
) -> Tensor:
    """() sum over valid nodes of weight times the squared residuals of the windows that end there.

    O(T) on the CPU; O(T x depth) and parallel over nodes on CUDA, which never synchronises: there depth-first
    parents and weights >= 0 are the caller's contract.
    """
    return torch.ops.fastgfn.subtb_tree(log_pf, log_flow, parent, valid, weight, subtb_lambda)


def subtb_tree_pairs(parent: Tensor, valid: Tensor, subtb_lambda: float) -> Tensor:
    """(T,) float64 sum of the weights of the windows that end at each node; 0 where valid is False."""
    return torch.ops.fastgfn.subtb_tree_pairs(parent, valid, subtb_lambda)


def subtb_pairwise(
    log_pf: Tensor,
    log_flow: Tensor,
    lengths: Tensor,
    subtb_lambda: float,
    loss: str,
    limit: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`subtb_padded` for any loss of `ops/residual.py`: O(T^2) time, memory bounded by one tile."""
    return _subtb_pairwise(log_pf, log_flow, lengths, subtb_lambda, loss, limit)[:2]


@torch.library.register_fake("fastgfn::subtb_padded")
def _(log_pf, log_flow, lengths, subtb_lambda):
    return log_pf.new_empty(log_pf.shape[0]), log_pf.new_empty(log_pf.shape[0])


@torch.library.register_fake("fastgfn::subtb_padded_backward")
def _(grad_numerator, log_pf, log_flow, lengths, subtb_lambda):
    return log_pf.new_empty(log_pf.shape), log_flow.new_empty(log_flow.shape)


@torch.library.register_fake("fastgfn::subtb_tree")
def _(log_pf, log_flow, parent, valid, weight, subtb_lambda):
    return log_pf.new_empty(())


@torch.library.register_fake("fastgfn::subtb_tree_backward")
def _(grad, log_pf, log_flow, parent, valid, weight, subtb_lambda):
    return log_pf.new_empty(log_pf.shape), log_flow.new_empty(log_flow.shape)


@torch.library.register_fake("fastgfn::subtb_tree_pairs")
def _(parent, valid, subtb_lambda):
    return parent.new_empty(parent.shape, dtype=torch.float64)


def _save_padded(ctx, inputs, output):
    *tensors, ctx.subtb_lambda = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _padded_backward(ctx, grad_numerator, _):
    grads = torch.ops.fastgfn.subtb_padded_backward(grad_numerator, *ctx.saved_tensors, ctx.subtb_lambda)
    return *grads, None, None


def _save_tree(ctx, inputs, output):
    *tensors, ctx.subtb_lambda = inputs
    ctx.save_for_backward(*tensors)


def _tree_backward(ctx, grad):
    grads = torch.ops.fastgfn.subtb_tree_backward(grad, *ctx.saved_tensors, ctx.subtb_lambda)
    return *grads, None, None, None, None


torch.library.register_autograd("fastgfn::subtb_padded", _padded_backward, setup_context=_save_padded)
torch.library.register_autograd("fastgfn::subtb_tree", _tree_backward, setup_context=_save_tree)


@torch.library.custom_op("fastgfn::subtb_pairwise", mutates_args=())
def _subtb_pairwise(
    log_pf: Tensor,
    log_flow: Tensor,
    lengths: Tensor,
    subtb_lambda: float,
    loss: str,
    limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator (N,), denominator (N,) and, for the backward, d numerator / d U, (N, T + 1) float64."""
    num_rows, num_states = log_flow.shape
    state = torch.arange(num_states, device=log_pf.device)
    is_step, is_state = state[None, :-1] < lengths[:, None], state[None] <= lengths[:, None]
    path = torch.nn.functional.pad(torch.where(is_step, log_pf, 0).double().cumsum(1), (1, 0))
    potential = path - torch.where(is_state, log_flow, 0).double()
    slopes = torch.zeros_like(potential)
    sums = potential.new_zeros(2, num_rows)
    # A tile is (rows, starts, states): whole rows while they fit, else a slice of one row's window starts.
    starts = max(1, min(num_states, TILE_ELEMENTS // num_states))
    rows = max(1, TILE_ELEMENTS // (num_states * starts))
    for first in range(0, num_states, starts):
        steps = state[None, :] - state[first : first + starts, None]
        weights = torch.full_like(steps, subtb_lambda, dtype=torch.float64) ** (steps - 1).clamp(min=0)
        weights = weights * (steps > 0)
        for row in range(0, num_rows, rows):
            u = potential[row : row + rows]
            weight = weights * is_state[row : row + rows, None, :]
            value, slope = value_and_slope(u[:, None, :] - u[:, first : first + starts, None], loss, limit)
            slope = weight * slope
            sums[0, row : row + rows] += (weight * value).sum((1, 2))
            sums[1, row : row + rows] += weight.sum((1, 2))
            slopes[row : row + rows] += slope.sum(1)
            slopes[row : row + rows, first : first + starts] -= slope.sum(2)
    return sums[0].to(log_pf.dtype, copy=True), sums[1].to(log_pf.dtype, copy=True), slopes


@_subtb_pairwise.register_fake
def _(log_pf, log_flow, lengths, subtb_lambda, loss, limit=None):
    numerator = log_pf.new_empty(log_pf.shape[0])
    return numerator, torch.empty_like(numerator), log_flow.new_empty(log_flow.shape, dtype=torch.float64)


def _save_pairwise(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _pairwise_backward(ctx, grad_numerator, *_):
    (slopes,) = ctx.saved_tensors
    grad = grad_numerator.double()[:, None] * slopes
    # From the right, so that it is exactly 0 on padding.
    grad_log_pf = grad.flip(1).cumsum(1).flip(1)[:, 1:]
    return grad_log_pf.to(ctx.dtype), -grad.to(ctx.dtype), None, None, None, None


_subtb_pairwise.register_autograd(_pairwise_backward, setup_context=_save_pairwise)
