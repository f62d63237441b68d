"""`split_tree` cuts a tree that is too large for one pass into parts of whole trajectories."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn import checks
from fastgfn.ops.scan import subtree_sum
from fastgfn.types import TokenTree, TreePart


def split_tree(tree: TokenTree, *, max_tokens: int | None) -> tuple[TreePart, ...]:
    """Parts of at most `max_tokens` nodes which together hold every trajectory once, and whole.

    Trajectories are taken in the order of their leaves, so that neighbours share prefixes, and a part ends
    where the next one's nodes no longer fit: no other cut of that order has fewer parts. A tree that fits, or
    any for max_tokens None, is its only part; of others, nodes that no trajectory passes are in no part.

    Raises:
        InputError: one trajectory and its prompt alone have more than max_tokens nodes.

    Numerics: exact integers, O(T) time and memory for every part; it synchronises with the host.
    """
    device, num = tree.tokens.device, tree.leaf.shape[0]
    if max_tokens is None or tree.num_nodes <= max_tokens:
        nodes = torch.arange(tree.num_nodes, device=device)
        return (TreePart(tree, nodes, torch.arange(num, device=device)),)
    leaves, order = tree.leaf.sort(stable=True)
    alone = tree.position[leaves] + 1
    longest = int(alone.max()) if num else 0
    name = "split_tree"
    want = f">= {longest}, the nodes of trajectory {int(order[alone.argmax()]) if num else 0} and its prompt"
    fix = "raise it, or shorten the prompt or max_length"
    checks.check(longest <= max_tokens, name, "max_tokens", want, max_tokens, fix)
    # In the order of the leaves a node is new to the first trajectory whose leaf is not before it.
    passed = (tree.count > 0).nonzero()[:, 0]
    new = torch.bincount(torch.searchsorted(leaves, passed), minlength=num)
    starts, size = [], max_tokens + 1
    for n, (whole, added) in enumerate(zip(alone.tolist(), new.tolist(), strict=True)):
        size += added
        if size > max_tokens:
            starts.append(n)
            size = whole
    return tuple(_part(tree, order[i:j]) for i, j in pairwise([*starts, num]))


def _part(tree: TokenTree, trajectories: Tensor) -> TreePart:
    at_leaf = torch.zeros(tree.num_nodes, dtype=torch.int64, device=tree.tokens.device)
    ones = torch.ones_like(trajectories)
    count = subtree_sum(at_leaf.index_add(0, tree.leaf[trajectories], ones), tree.parent)
    nodes = count.nonzero()[:, 0]
    # kept nodes before each node: its new number
    number = pad((count > 0).cumsum(0), (1, 0))
    parent = tree.parent[nodes].long()
    part = TokenTree(
        tokens=tree.tokens[nodes],
        position=tree.position[nodes],
        end=number[tree.end[nodes].long()].int(),
        parent=number[parent.clamp(min=0)].masked_fill(parent < 0, -1).int(),
        count=count[nodes].int(),
        group=tree.group[nodes],
        role=tree.role[nodes],
        leaf=number[tree.leaf[trajectories]],
        length=tree.length[nodes],
        is_state=tree.is_state[nodes],
        constraints=tree.constraints,
        allowed=tree.allowed,
        allowed_row=None if tree.allowed_row is None else tree.allowed_row[nodes],
    )
    return TreePart(part, nodes, trajectories)
