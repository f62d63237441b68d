"""Plain truth for tree building and node gathers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn.types import Role


def build_tree(
    prompts: Sequence[Tensor], tokens: Tensor, lengths: Tensor, group: Tensor, roles: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The trie of every group's prompt and sequences, listed depth first.

    A node is [token, role, count, children], children keyed by (token, role): a dict keeps the order of first
    appearance. Returns (tokens, position, end, parent, count, group, role, leaf).
    """
    if roles is None:
        roles = torch.full_like(tokens, Role.ACTION)
    roots, paths = [], []
    for prompt in prompts:
        root = {}
        node = root
        for token in prompt.tolist():
            child = [token, int(Role.PROMPT), 0, {}]
            node[token, int(Role.PROMPT)] = child
            node = child[3]
        roots.append(root)
    for n in range(len(lengths)):
        steps = [(token, int(Role.PROMPT)) for token in prompts[group[n]].tolist()]
        steps += zip(tokens[n, : lengths[n]].tolist(), roles[n, : lengths[n]].tolist(), strict=True)
        node = roots[group[n]]
        for token, role in steps:
            child = node.setdefault((token, role), [token, role, 0, {}])
            child[2] += 1
            node = child[3]
        paths.append(id(node))
    rows, place = [], {}
    for g, root in enumerate(roots):
        _visit(root, g, rows, place)
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(7)]
    dtypes = (torch.int64, torch.int64, *[torch.int32] * 4, torch.int8)
    arrays = [torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)]
    return (*arrays, torch.tensor([place[p] for p in paths], dtype=torch.int64))


def _visit(children: dict, group: int, rows: list, place: dict, parent: int = -1, depth: int = 0) -> None:
    for token, role, count, grandchildren in children.values():
        j = len(rows)
        rows.append([token, depth, j + 1, parent, count, group, role])
        place[id(grandchildren)] = j
        _visit(grandchildren, group, rows, place, j, depth + 1)
        rows[j][2] = len(rows)


def path_nodes(parent: Tensor, leaf: Tensor, num_nodes: Tensor, width: int) -> Tensor:
    """Row n: the last num_nodes[n] nodes of the path to leaf[n], root first, padded with -1."""
    out = torch.full((len(leaf), width), -1, dtype=torch.int64)
    for n, node in enumerate(leaf.tolist()):
        for k in reversed(range(int(num_nodes[n]))):
            out[n, k] = node
            node = int(parent[node])
    return out


def gather_nodes(values: Tensor, index: Tensor) -> Tensor:
    """values[index], 0 where index is -1."""
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[index]


def scatter_add_nodes(grad: Tensor, index: Tensor, num_nodes: int) -> Tensor:
    """out[j] = sum of grad where index == j; -1 is dropped."""
    flat = index.reshape(-1)
    padded = grad.new_zeros(num_nodes + 1)
    slot = torch.where(flat < 0, num_nodes, flat)
    return padded.index_add(0, slot, grad.reshape(-1))[:num_nodes]
