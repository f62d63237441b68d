"""The running batch: prompts x samples as one growing token tree.

Trajectories that share their whole prefix share one row of the batch, so the model sees every distinct prefix
once; the keys and values of a prefix are nodes of a pool, which nothing copies. Trajectories that finish make
room for waiting ones. The noise of a draw is keyed by (seed, trajectory, position, token), so none of this
changes which tokens are drawn, but for ties within the rounding of the model's products.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.attention import KeyValues, PathAttention, TreeAttention
from fastgfn.models import Policy
from fastgfn.ops.attention import TreeMask
from fastgfn.phases import phase
from fastgfn.rollout.drafts import DraftRequest, Drafts
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.hooks import Tool
from fastgfn.rollout.nodes import NodePool, PrefixTree, in_parts
from fastgfn.rollout.trajectories import Trajectories
from fastgfn.types import Constraints, Grammar, Rollouts

# Prompt tokens of one prefill.
PREFILL_TOKENS = 4096
# Room is filled when this share of the batch is free, so that prompts are prefilled together.
REFILL_SHARE = 0.25


@dataclass(slots=True)
class Request:
    """What is to be drawn, and how."""

    prompts: Sequence[Tensor]
    group: Tensor  # (N,) int64
    constraints: Constraints
    temperature: Tensor  # (N,) float32
    first_trajectory: int
    prefixes: Sequence[Sequence[int]] | None = None
    grammar: Grammar | None = None
    tool: Tool | None = None
    drafts: Drafts | None = None
    distinct: list[tuple[int, ...]] = field(init=False)  # prompts
    prompt_of_group: Tensor = field(init=False)  # (G,) int64, places in `distinct`

    def __post_init__(self) -> None:
        known: dict[tuple[int, ...], int] = {}
        places = [known.setdefault(tuple(p.tolist()), len(known)) for p in self.prompts]
        self.prompt_of_group, self.distinct = torch.tensor(places, dtype=torch.int64), list(known)

    @property
    def lookahead(self) -> int:
        """Most tokens of a draft: the state after max_length tokens is never read."""
        return 0 if self.drafts is None else min(self.drafts.length, self.constraints.max_length - 1)


@dataclass(slots=True)
class Rows:
    """The rows of the batch: their hidden states, nodes and paths from the root."""

    hidden: Tensor  # (R, D) on the model's device
    node: Tensor  # (R,) int64
    path: Tensor  # (R, W) int32
    length: Tensor  # (R,) int64, nodes of the path

    def __len__(self) -> int:
        return self.node.shape[0]

    def extended(self, other: "Rows") -> "Rows":
        return Rows(*(torch.cat([getattr(self, f), getattr(other, f)]) for f in self.__slots__))


class Engine:
    """Draws the trajectories of a request; `run` returns them."""

    def __init__(self, policy: Policy, request: Request, drawer: Drawer, batch_size: int) -> None:
        self.policy = policy
        self.request = request
        self.drawer = drawer
        self.batch_size = batch_size
        self.max_length = request.constraints.max_length
        self.trajectories = Trajectories(
            request.prompts,
            request.group,
            request.constraints,
            request.tool,
            policy.vocab_size,
            has_grammar=request.grammar is not None,
        )
        self._reset()

    def _reset(self) -> None:
        """An empty batch; every unfinished trajectory waits."""
        capacity = self.capacity(self.request, self.batch_size)
        self.pool = NodePool(capacity)
        self.kv = KeyValues(capacity)
        self.width = max(map(len, self.request.distinct)) + self.max_length
        self.rows: Rows | None = None
        self.alive = torch.zeros(0, dtype=torch.int64)  # trajectories
        self.row_of = torch.zeros(0, dtype=torch.int64)
        self.drafted = Drafted()
        self.drafter = None
        if self.request.drafts is not None:
            source = self.request.drafts.source
            self.drafter = source.begin(self.policy, self.drawer, self.pool, self.width)
        self.resident: dict[int, Rows] = {}  # prompts of which some trajectories still wait
        self.waiting = (~self.trajectories.finished).nonzero()[:, 0]

    @staticmethod
    def capacity(request: Request, batch_size: int) -> int:
        """Most nodes at a time: the longest prompts that the batch may hold, all its tokens and drafts."""
        own = request.constraints.max_length + 2 * request.lookahead
        return prompt_nodes(request, batch_size) + batch_size * own

    def run(self) -> Rollouts:
        while len(self.waiting) or len(self.alive):
            try:
                self._admit()
                self._step()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._start_again(error)
        return self.trajectories.result()

    def _admit(self) -> None:
        """Fill the free part of the batch, if it is large enough, with waiting trajectories, in order."""
        room = self.batch_size - len(self.alive)
        if not len(self.waiting) or (len(self.alive) and room < self.batch_size * REFILL_SHARE):
            return
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        wanted, place = self._prompts_of(new).unique(return_inverse=True)
        rows = self._rows_of_prompts(wanted.tolist())
        first_row = 0 if self.rows is None else len(self.rows)
        self.rows = rows if self.rows is None else self.rows.extended(rows)
        self.alive = torch.cat([self.alive, new])
        self.row_of = torch.cat([self.row_of, first_row + place])

    def _rows_of_prompts(self, wanted: list[int]) -> Rows:
        self._prefill_missing(wanted)
        still_waiting = set(self._prompts_of(self.waiting).unique().tolist())
        found = [self.resident[p] for p in wanted]
        for prompt, rows in zip(wanted, found, strict=True):
            if prompt in still_waiting:
                self.pool.hold(rows.node)
            else:
                del self.resident[prompt]
        out = found[0]
        for rows in found[1:]:
            out = out.extended(rows)
        return out

    def _prompts_of(self, trajectories: Tensor) -> Tensor:
        return self.request.prompt_of_group[self.request.group[trajectories]]

    def _make_room(self, wanted: list[int]) -> None:
        """Forget prompts that nothing runs below, the last of the queue first, until `wanted` fit."""
        needed = {*wanted, *self._prompts_of(self.alive).tolist()}
        nodes = sum(len(self.request.distinct[p]) for p in {*self.resident, *needed})
        excess = nodes - prompt_nodes(self.request, self.batch_size)
        if excess <= 0:
            return
        for prompt in reversed(dict.fromkeys(self._prompts_of(self.waiting).tolist())):
            if excess > 0 and prompt in self.resident and prompt not in needed:
                self.pool.release(self.resident.pop(prompt).node)
                excess -= len(self.request.distinct[prompt])

    def _prefill_missing(self, wanted: list[int]) -> None:
        """Make these prompts resident, PREFILL_TOKENS at a time."""
        self._make_room(wanted)
        missing = {self.request.distinct[p]: p for p in wanted if p not in self.resident}
        for part in in_parts(missing, PREFILL_TOKENS):
            self._prefill([missing[prompt] for prompt in part])

    @phase("prefill")
    def _prefill(self, prompts: list[int]) -> None:
        """Make prompts resident, each held once."""
        device = self.policy.device
        tree = PrefixTree([self.request.distinct[p] for p in prompts])
        nodes = self.pool.take(len(tree.tokens))
        self.pool.link(nodes, torch.where(tree.parent >= 0, nodes[tree.parent], -1))
        self.pool.token[nodes] = tree.tokens
        position = tree.position.to(device)
        attention = TreeAttention(TreeMask(tree.end.to(device), position), self.kv, nodes.to(device))
        hidden = self.policy.hidden(tree.tokens.to(device), position, attention)
        last = torch.tensor([path[-1] for path in tree.path])
        is_last = torch.zeros(len(nodes), dtype=torch.bool).index_fill_(0, last, True)
        self.pool.release(nodes[~is_last])
        hidden = hidden[last.to(device)]
        for i, prompt in enumerate(prompts):
            own = nodes[tree.path[i]]
            path = torch.zeros(1, self.width, dtype=torch.int32)
            path[0, : len(own)] = own
            self.resident[prompt] = Rows(hidden[i : i + 1], own[-1:], path, torch.tensor([len(own)]))

    def _step(self) -> None:
        """Draw as far as computed rows reach, then compute the rows of what was drawn."""
        alive, row_of = self.alive, self.row_of
        todo: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(alive):
            token = self._draw(alive, row_of)
            going = self.trajectories.append(alive, token)
            alive, row_of, token = alive[going], row_of[going], token[going]
            child = self.drafted.find(row_of, token, self.policy.vocab_size)
            is_there = child >= 0
            if self.request.drafts is not None:
                self.request.drafts.accepted += int(child[is_there].unique().numel())
            todo.append((alive[~is_there], row_of[~is_there], token[~is_there]))
            alive, row_of = alive[is_there], child[is_there]
        self.alive, row_of, token = (torch.cat(x) for x in zip(*todo, strict=True))
        key, self.row_of = (row_of * self.policy.vocab_size + token).unique(return_inverse=True)
        rows, self.rows, self.drafted = self.rows, None, Drafted()
        if len(key):
            new = self._grow(rows, key // self.policy.vocab_size, key % self.policy.vocab_size)
        self.pool.release(rows.node)
        if len(key):
            self._forward(*new)

    def _grow(self, rows: Rows, parent: Tensor, token: Tensor) -> tuple[Tensor, Rows]:
        """New rows below `parent`, with their drafts after them, without hidden states; and their tokens."""
        nodes = self.pool.take(len(parent))
        self.pool.link(nodes, rows.node[parent])
        self.pool.token[nodes] = token
        length = rows.length[parent] + 1
        path = rows.path[parent]
        path[torch.arange(len(nodes)), length - 1] = nodes.int()
        grown = Rows(rows.hidden[:0], nodes, path, length)
        if self.request.drafts is not None:
            grown = self._with_drafts(grown)
        return self.pool.token[grown.node], grown

    def _with_drafts(self, rows: Rows) -> Rows:
        drafts, places = self.request.drafts, torch.arange(len(rows))
        first = torch.full_like(places, len(self.request.group))
        first.scatter_reduce_(0, self.row_of, self.alive, "amin")
        position = self.trajectories.lengths[first]
        count = (self.max_length - 1 - position).clamp(0, self.request.lookahead)
        row, depth = _ragged(count)
        ahead = self.pool.take(len(row))
        rows.path[row, rows.length[row] + depth] = ahead.int()
        request = DraftRequest(
            self.pool, rows.path, rows.length, count, self.request.first_trajectory + first, position,
            self.request.temperature[first],
        )  # fmt: skip
        stops, vocab = self.request.constraints.termination_token_ids, self.policy.vocab_size
        chains = drafts.propose(self.drafter, request, vocab, stops)
        size = torch.tensor([len(chain) for chain in chains])
        is_used = depth < size[row]
        self.pool.release(ahead[~is_used])
        row, depth, nodes = row[is_used], depth[is_used], ahead[is_used]
        token = torch.tensor([t for chain in chains for t in chain], dtype=torch.int64)
        path, length = rows.path[row], rows.length[row] + depth + 1
        self.pool.link(nodes, path[torch.arange(len(nodes)), length - 2].long())
        self.pool.token[nodes] = token
        at = len(rows) + torch.arange(len(nodes))
        self.drafted.add(torch.where(depth == 0, row, at - 1), token, at, vocab)
        return rows.extended(Rows(rows.hidden, nodes, path, length))

    def _forward(self, token: Tensor, rows: Rows) -> None:
        device = self.policy.device
        attention = PathAttention(self.kv, rows.node.to(device), rows.path.to(device), rows.length.to(device))
        rows.hidden = self.policy.hidden(token.to(device), (rows.length - 1).to(device), attention)
        self.rows = rows

    def _draw(self, alive: Tensor, row_of: Tensor) -> Tensor:
        """(A,) the next token of every trajectory: what its tool returned, what its prefix says, a draw."""
        token = self.trajectories.observations(alive)
        own = (token < 0).nonzero()[:, 0]
        if len(own):
            token[own] = self._draw_actions(alive[own], row_of[own])
        return token

    def _draw_actions(self, alive: Tensor, row_of: Tensor) -> Tensor:
        request, hidden = self.request, self.rows.hidden
        step = self.trajectories.lengths[alive]
        allowed = None
        if request.grammar is not None:
            allowed = request.grammar.allowed([self.trajectories.sequence(i) for i in alive.tolist()])
        draw = self.drawer(
            hidden, row_of, request.temperature[alive], request.first_trajectory + alive, step, allowed
        )
        token, log_pf, log_behavior = draw.token, draw.log_pf, draw.log_behavior
        if request.prefixes is not None:
            pairs = zip(alive.tolist(), self.trajectories.num_actions(alive).tolist(), strict=True)
            given = torch.tensor([p[k] if k < len(p := request.prefixes[i]) else -1 for i, k in pairs])
            own = (given >= 0).nonzero()[:, 0]
            found = self.drawer.log_pf(
                hidden, row_of[own], given[own], step[own], None if allowed is None else allowed[own]
            )
            fix = "give prefixes that the vocabulary mask and the grammar allow"
            checks.check(
                bool(found.isfinite().all()), "sample", "prefixes", "of probability above 0", "0", fix
            )
            token = token.index_copy(0, own, given[own])
            log_pf = log_pf.index_copy(0, own, found.to(log_pf.dtype))
            log_behavior = log_behavior.index_fill(0, own, 0.0)
        self.trajectories.draw(alive, token, log_pf, draw.log_pterm, log_behavior)
        return token

    def _start_again(self, error: Exception) -> None:
        """After running out of memory: finished trajectories stay, the others start again in half the batch.

        Raises:
            OutOfMemory: there was no other trajectory in the batch.
        """
        finished = self.trajectories.finished
        if self.batch_size == 1:
            done = f"{int(finished.sum())} of {len(finished)} trajectories are finished"
            found = self.trajectories.result()
            message = f"sample: out of memory with one trajectory running ({error})"
            raise OutOfMemory(f"{message}; {done}, in `rollouts` of this error", found)
        running = len(self.alive) or self.batch_size
        self.batch_size = max(1, min(self.batch_size, running) // 2)
        warnings.warn(f"sample: out of memory, going on with batch_size={self.batch_size}", stacklevel=3)
        self.trajectories.restart((~finished).nonzero()[:, 0])
        self._reset()


def prompt_nodes(request: Request, batch_size: int) -> int:
    """Most nodes of prompts at a time: of the longest that may run, and of the next of the queue."""
    return sum(sorted(map(len, request.distinct), reverse=True)[: batch_size + 1])


def _ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """For count[0] items, then count[1], ...: the place in `count` of each, and its number there."""
    row = torch.arange(len(count)).repeat_interleave(count)
    return row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]


class Drafted:
    """Rows that exist because a draft said so, by parent row and token."""

    def __init__(self) -> None:
        self._key = torch.zeros(0, dtype=torch.int64)
        self._row = torch.zeros(0, dtype=torch.int64)

    def add(self, parent: Tensor, token: Tensor, row: Tensor, vocab: int) -> None:
        key, order = torch.cat([self._key, parent * vocab + token]).sort()
        self._key, self._row = key, torch.cat([self._row, row])[order]

    def find(self, parent: Tensor, token: Tensor, vocab: int) -> Tensor:
        """(K,) the row below each parent, -1 where there is none."""
        if not len(self._key):
            return torch.full_like(parent, -1)
        key = parent * vocab + token
        at = torch.searchsorted(self._key, key).clamp(max=len(self._key) - 1)
        return torch.where(self._key[at] == key, self._row[at], -1)


class OutOfMemory(RuntimeError):
    """Sampling ran out of memory; `rollouts` holds the trajectories that were finished."""

    def __init__(self, message: str, rollouts: Rollouts) -> None:
        super().__init__(message)
        self.rollouts = rollouts


def is_out_of_memory(error: BaseException | None) -> bool:
    """The error or one that led to it: running out while a graph is captured makes the capture fail."""
    if error is None or isinstance(error, checks.InputError):
        return False
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    known = known or "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    return known or is_out_of_memory(error.__context__)
