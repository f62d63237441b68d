"""Tree building and node gathers: the dispatcher ops `fastgfn::build_tree` (on the host, csrc/tree.cpp),
`path_nodes`, `gather_nodes`, `scatter_add_nodes` (also csrc/cuda/tree.cu) and their fakes and gradients.

On CUDA the latter three never synchronise, so only dtypes and shapes are refused. Out of range, a gather
gives nan (0 where the dtype has none), a scatter drops the entry, and a path longer than its leaf is deep is
filled up with -1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn.types import Role

TreeArrays = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def build_tree(
    prompts: Sequence[Tensor],  # G of (P_g,) int64
    tokens: Tensor,  # (N, L) int64
    lengths: Tensor,  # (N,)
    group: Tensor,  # (N,)
    roles: Tensor | None = None,  # (N, L) int8
) -> TreeArrays:
    """The arrays (tokens, position, end, parent, count, group, role, leaf) of a TokenTree, on the host.

    Padding past `lengths` is never read; `roles` None means that every token is an action.
    """
    kept = torch.arange(tokens.shape[1]) < lengths.cpu()[:, None]
    flat = tokens.cpu()[kept].long()
    flat_roles = torch.full_like(flat, Role.ACTION, dtype=torch.int8) if roles is None else roles.cpu()[kept]
    prompt_tokens = torch.cat([p.cpu() for p in prompts]) if prompts else flat.new_zeros(0)
    return torch.ops.fastgfn.build_tree(
        prompt_tokens,
        _offsets(torch.tensor([len(p) for p in prompts], dtype=torch.int64)),
        flat,
        flat_roles,
        _offsets(lengths.cpu()),
        group.cpu().long().contiguous(),
    )


def path_nodes(parent: Tensor, leaf: Tensor, num_nodes: Tensor, width: int) -> Tensor:
    """(N, width) int64: the last num_nodes[n] nodes of the path to leaf[n], root first, padded with -1."""
    return torch.ops.fastgfn.path_nodes(parent, leaf, num_nodes, width)


def gather_nodes(values: Tensor, index: Tensor) -> Tensor:
    """values[index] with 0 where index is -1; differentiable in values, deterministic backward."""
    return torch.ops.fastgfn.gather_nodes(values, index)


def scatter_add_nodes(grad: Tensor, index: Tensor, num_nodes: int) -> Tensor:
    """(num_nodes,): sum of grad over equal indices in index order, -1 dropped; differentiable in grad."""
    return torch.ops.fastgfn.scatter_add_nodes(grad, index, num_nodes)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))


@torch.library.register_fake("fastgfn::build_tree")
def _(prompt_tokens, prompt_offsets, tokens, roles, offsets, group):
    num_nodes = torch.library.get_ctx().new_dynamic_size()
    int64, int32, int8 = (
        tokens.new_empty(num_nodes, dtype=d) for d in (torch.int64, torch.int32, torch.int8)
    )
    position, parent, count, node_group = (torch.empty_like(t) for t in (int64, int32, int32, int32))
    return int64, position, int32, parent, count, node_group, int8, torch.empty_like(group)


@torch.library.register_fake("fastgfn::path_nodes")
def _(parent, leaf, num_nodes, width):
    return leaf.new_empty(leaf.shape[0], width)


@torch.library.register_fake("fastgfn::gather_nodes")
def _(values, index):
    return values.new_empty(index.shape)


@torch.library.register_fake("fastgfn::scatter_add_nodes")
def _(grad, index, num_nodes):
    return grad.new_empty(num_nodes)


def _save_gather(ctx, inputs, output):
    values, index = inputs
    ctx.save_for_backward(index)
    ctx.num_nodes = values.shape[0]


def _gather_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return scatter_add_nodes(grad, index, ctx.num_nodes), None


def _save_scatter(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return gather_nodes(grad, index), None, None


torch.library.register_autograd("fastgfn::gather_nodes", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("fastgfn::scatter_add_nodes", _scatter_backward, setup_context=_save_scatter)
