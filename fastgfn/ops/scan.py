"""Running sums: ops `fastgfn::tree_cumsum`, `subtree_sum` and `segment_cumsum` (csrc/scan.cpp and
csrc/cuda/scan.cu), their fakes and gradients. float32, float64 or int64; float32 accumulates in double.

On CUDA nothing synchronises, so only dtypes and shapes are refused: parents must be depth-first and offsets
non-decreasing from 0 to the number of values, else the result is undefined (no access leaves the arrays).
"""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401


def tree_cumsum(values: Tensor, parent: Tensor) -> Tensor:
    """Sum of values (T,) along the path from the root to each node, the node included."""
    return torch.ops.fastgfn.tree_cumsum(values, parent)


def subtree_sum(values: Tensor, parent: Tensor) -> Tensor:
    """Sum of values (T,) over each node and its descendants: values[j:end[j]].sum()."""
    return torch.ops.fastgfn.subtree_sum(values, parent)


def segment_cumsum(values: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:
    """Inclusive cumulative sum within each row [offsets[n], offsets[n + 1]) of flat values."""
    return torch.ops.fastgfn.segment_cumsum(values, offsets, reverse)


@torch.library.register_fake("fastgfn::tree_cumsum")
def _(values, parent):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastgfn::subtree_sum")
def _(values, parent):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastgfn::segment_cumsum")
def _(values, offsets, reverse=False):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _save_index(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _cumsum_backward(ctx, grad):
    (parent,) = ctx.saved_tensors
    return subtree_sum(grad, parent), None


def _subtree_backward(ctx, grad):
    (parent,) = ctx.saved_tensors
    return tree_cumsum(grad, parent), None


def _save_segments(ctx, inputs, output):
    _, offsets, ctx.reverse = inputs
    ctx.save_for_backward(offsets)


def _segment_backward(ctx, grad):
    (offsets,) = ctx.saved_tensors
    return segment_cumsum(grad, offsets, not ctx.reverse), None, None


torch.library.register_autograd("fastgfn::tree_cumsum", _cumsum_backward, setup_context=_save_index)
torch.library.register_autograd("fastgfn::subtree_sum", _subtree_backward, setup_context=_save_index)
torch.library.register_autograd("fastgfn::segment_cumsum", _segment_backward, setup_context=_save_segments)
