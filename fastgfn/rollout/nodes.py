"""The nodes of a running batch: which places of the pool of keys and values are taken, and by what.

A node is one token below one prefix. It is held by the rows that end there and by its children, and is free
again when nothing holds it. All of this is on the host, a few integers per node.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastgfn import checks


class NodePool:
    """`capacity` nodes: `token`, `parent` (-1 at a root), `holds` and `takes`, how often each was taken; all
    (capacity,) int64."""

    def __init__(self, capacity: int) -> None:
        self.token = torch.zeros(capacity, dtype=torch.int64)
        self.parent = torch.full((capacity,), -1)
        self.holds = torch.zeros(capacity, dtype=torch.int64)
        self.takes = torch.zeros(capacity, dtype=torch.int64)
        self._free = torch.arange(capacity).flip(0)
        self._num_free = capacity

    @property
    def capacity(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return self.capacity - self._num_free

    def take(self, count: int) -> Tensor:
        """(count,) new roots, each held once by the caller."""
        fix = "lower batch_size"
        checks.check(count <= self._num_free, "sample", "free nodes", f">= {count}", self._num_free, fix)
        self._num_free -= count
        nodes = self._free[self._num_free : self._num_free + count].flip(0)
        self.holds[nodes] = 1
        self.takes[nodes] += 1
        self.parent[nodes] = -1
        return nodes

    def link(self, nodes: Tensor, parents: Tensor) -> None:
        """Put new nodes below their parents, -1 for a root."""
        self.parent[nodes] = parents
        self.hold(parents[parents >= 0])

    def hold(self, nodes: Tensor) -> None:
        self.holds.index_add_(0, nodes, torch.ones_like(nodes))

    def release(self, nodes: Tensor) -> None:
        """Give back one hold of each node; ancestors that only such nodes held become free too."""
        while len(nodes):
            self.holds.index_add_(0, nodes, torch.full_like(nodes, -1))
            nodes = nodes.unique()
            gone = nodes[self.holds[nodes] == 0]
            self._free[self._num_free : self._num_free + len(gone)] = gone
            self._num_free += len(gone)
            nodes = self.parent[gone]
            nodes = nodes[nodes >= 0]


class PrefixTree:
    """Distinct token sequences as one forest in depth-first order, a node per distinct prefix.

    tokens, position (T,) int64, end (T,) int32, parent (T,) int64 as in a TokenTree; path[i] lists the nodes
    of sequence i.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        tokens, position, parent, end = [], [], [], []
        self.path: list[list[int]] = [[] for _ in sequences]
        open_nodes: list[int] = []
        previous: Sequence[int] = ()
        for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
            sequence, common = sequences[i], 0
            while common < min(len(previous), len(sequence)) and previous[common] == sequence[common]:
                common += 1
            for node in open_nodes[common:]:
                end[node] = len(tokens)
            del open_nodes[common:]
            for depth in range(common, len(sequence)):
                parent.append(open_nodes[-1] if open_nodes else -1)
                open_nodes.append(len(tokens))
                tokens.append(sequence[depth])
                position.append(depth)
                end.append(-1)
            self.path[i] = list(open_nodes)
            previous = sequence
        for node in open_nodes:
            end[node] = len(tokens)
        self.tokens, self.position, self.parent = (
            torch.tensor(x, dtype=torch.int64) for x in (tokens, position, parent)
        )
        self.end = torch.tensor(end, dtype=torch.int32)


def in_parts(sequences: Iterable[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """The sequences in order, as many at a time as have `most` items together, one at least."""
    part: list[Sequence[int]] = []
    for sequence in sequences:
        if part and sum(map(len, part)) + len(sequence) > most:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part
