"""`hang_suffixes`: a tree in which Y follows every prefix that may stop, whose reward is p(X Z Y)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn.types import Role, TokenTree


def hang_suffixes(tree: TokenTree, suffixes: Sequence[Sequence[Sequence[int]]]) -> tuple[TokenTree, Tensor]:
    """The tree with a chain of suffix nodes for each candidate of its prompt below every terminable node.

    A node's chains come directly after it, before its other children, so that depth-first order and the
    attention mask stay what they are. What is kept of the policy's states is their place: no node of the
    larger tree is a state, and it has a trajectory for each chain, which ends where the chain does.

    Args:
        suffixes: for each of G prompts, one or more non-empty lists of token ids.

    Returns:
        The larger tree, of T nodes and those of the chains; and (C,) int64, ascending, the node of `tree`
        that each of its C trajectories hangs from.
    """
    device = tree.tokens.device
    sizes = torch.tensor([sum(map(len, candidates)) for candidates in suffixes], device=device)
    owner = tree.terminable.nonzero()[:, 0]
    extra = torch.zeros_like(tree.position).index_copy(0, owner, sizes[tree.group[owner].long()])
    # chain nodes before each node: by how much its number grows
    shift = pad(extra.cumsum(0), (1, 0))
    number = torch.arange(tree.num_nodes, device=device) + shift[:-1]
    total = tree.num_nodes + int(shift[-1])
    fields = {}
    for name in ("tokens", "position", "end", "parent", "count", "group", "role", "length"):
        fields[name] = getattr(tree, name).new_empty(total).index_copy(0, number, getattr(tree, name))
    end = tree.end.long()
    fields["end"][number] = (end + shift[end]).int()
    above = tree.parent.long()
    fields["parent"][number] = torch.where(above < 0, -1, number[above.clamp(min=0)]).int()
    fields["role"].fill_(Role.SUFFIX)[number] = tree.role
    leaves, hangs = [], []
    for group, candidates in enumerate(suffixes):
        nodes = owner[tree.group[owner] == group]
        first = number[nodes] + 1
        for candidate in candidates:
            chain = _chain(tree, nodes, number[nodes], first, torch.tensor(candidate, device=device))
            places = first[:, None] + torch.arange(len(candidate), device=device)
            for name, values in chain.items():
                fields[name][places] = values.expand(places.shape).to(fields[name].dtype)
            first = first + len(candidate)
            leaves.append(first - 1)
            hangs.append(nodes)
    leaf, order = torch.cat(leaves).sort()
    passing = torch.zeros(total, dtype=torch.int64, device=device).index_fill(0, leaf, 1)
    before = pad(passing.cumsum(0), (1, 0))
    fields["count"] = (before[fields["end"].long()] - before[:-1]).int()
    states = torch.zeros(total, dtype=torch.bool, device=device)
    large = replace(tree, **fields, leaf=leaf, is_state=states, allowed=None, allowed_row=None)
    return large, torch.cat(hangs)[order]


def _chain(tree: TokenTree, nodes: Tensor, number: Tensor, first: Tensor, candidate: Tensor) -> dict:
    """The fields of one copy of a candidate below each of `nodes`, whose new number is `number`, with its
    first token at `first`: (nodes, tokens of the candidate), or what broadcasts to it."""
    step = torch.arange(len(candidate), device=candidate.device)
    parent = first[:, None] + step - 1
    parent[:, 0] = number
    return {
        "tokens": candidate,
        "position": tree.position[nodes][:, None] + 1 + step,
        "end": (first + len(candidate))[:, None],
        "parent": parent,
        "group": tree.group[nodes][:, None],
        "length": tree.length[nodes][:, None],
    }
