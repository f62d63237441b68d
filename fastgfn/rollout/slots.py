"""The state of a batch of slots on the model's device, and the step that advances all of them.

A slot holds a trajectory that runs, one that is finished and waits to be fetched, or none. A step reads no
value on the host and keeps every shape and address, so a CUDA graph may replay it. A slot that does not run
is computed like the others: its draws go to a spare column, its keys and values to nodes of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastgfn.attention import KeyValues, PathAttention
from fastgfn.models import Policy
from fastgfn.ops.path_attention import SharedPrompts
from fastgfn.rollout.draws import Drawer

# Slots that read their prompt together, and nodes of a prompt below which that costs what it saves: the sums
# of two slots are written and read in as many bytes (kernels/path_attention.py).
TILE_ROWS = 16
LEAST_SHARED = 32


@dataclass(frozen=True, slots=True)
class Slots:
    """S slots for up to L tokens each, below prompts of up to W - L nodes."""

    hidden: Tensor  # (S, D), at the last token: what the next draw reads
    path: Tensor  # (S, W) int32, nodes of the prompt, then the slot's own
    first: Tensor  # (S,) int64, the first of its L own nodes
    depth: Tensor  # (S,) int64, nodes of the prompt
    trajectory: Tensor  # (S,) int64, keys the noise
    temperature: Tensor  # (S,) float32
    lengths: Tensor  # (S,) int64, tokens of Z so far
    tokens: Tensor  # (S, L + 1) int64, the last column spare
    log_pf: Tensor  # (S, L + 1) float32, likewise
    log_pterm: Tensor  # (S, L + 2) float32, likewise
    log_behavior: Tensor  # (S,) float32
    terminated: Tensor  # (S,) bool, drew the termination token
    finished: Tensor  # (S,) bool, True of an empty slot
    bad_hidden: Tensor  # (S,) bool, ran into a hidden state that is not finite
    bad_draw: Tensor  # (S,) bool, had no token left
    tiles: Tensor  # (S, R) int32, slots of one prompt, then -1; at most the first S / 2 tiles are not empty
    shared: Tensor  # (S,) int64, nodes that a slot reads with its tile

    @staticmethod
    def empty(size: int, width: int, max_length: int, like: Tensor) -> "Slots":
        """`like`: a hidden state (..., D). The nodes of slot s are s * max_length and after."""
        device = like.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, *shape, dtype=dtype, device=device)

        first = torch.arange(size, device=device) * max_length
        return Slots(
            hidden=zeros(like.shape[-1], dtype=like.dtype),
            path=(first[:, None] + torch.arange(width, device=device)).int(),
            first=first,
            depth=zeros(),
            trajectory=zeros(),
            temperature=zeros(dtype=torch.float32) + 1.0,
            lengths=zeros(),
            tokens=zeros(max_length + 1),
            log_pf=zeros(max_length + 1, dtype=torch.float32),
            log_pterm=zeros(max_length + 2, dtype=torch.float32),
            log_behavior=zeros(dtype=torch.float32),
            terminated=zeros(dtype=torch.bool),
            finished=~zeros(dtype=torch.bool),
            bad_hidden=zeros(dtype=torch.bool),
            bad_draw=zeros(dtype=torch.bool),
            tiles=zeros(TILE_ROWS, dtype=torch.int32) - 1,
            shared=zeros(),
        )

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def clear(self) -> None:
        """As `empty` makes them, in the memory that they have."""
        sizes = len(self), self.path.shape[1], self.tokens.shape[1] - 1
        new = Slots.empty(*sizes, like=self.hidden)
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(new, f.name))

    def start(self, size: int) -> "Slots":
        """The first `size` slots, in the same memory."""
        return Slots(*(getattr(self, f.name)[:size] for f in fields(self)))

    def fill(
        self,
        at: Tensor,  # (K,) int64 slots
        hidden: Tensor,  # (K, D) at the last token of their prompts
        path: Tensor,  # (K, W) int32 nodes of the prompts
        depth: Tensor,  # (K,) int64 how many
        trajectory: Tensor,  # (K,) int64
        temperature: Tensor,  # (K,) float32
    ) -> None:
        """Begin trajectories in these slots."""
        column = torch.arange(path.shape[1], device=path.device)
        own = self.first[at][:, None] + (column - depth[:, None])
        path = torch.where(column < depth[:, None], path, own.int())
        for whole, part in (
            (self.hidden, hidden),
            (self.path, path),
            (self.depth, depth),
            (self.trajectory, trajectory),
            (self.temperature, temperature),
        ):
            whole.index_copy_(0, at, part)
        for whole in (self.tokens, self.lengths, self.log_pf, self.log_behavior):
            whole.index_fill_(0, at, 0)
        for whole in (self.terminated, self.finished):
            whole.index_fill_(0, at, False)
        self.log_pterm.index_fill_(0, at, torch.nan)

    def move(self, at: Tensor) -> None:
        """Put slots `at` (K,) first, in this order. The nodes stay where they are: the paths lead there.
        What they share is to be said again."""
        for f in fields(self):
            whole = getattr(self, f.name)
            whole[: len(at)].copy_(whole.index_select(0, at))

    def share(self, tiles: Tensor, shared: Tensor) -> None:
        """From now on these slots read their prompts together, as `tiles_of` says."""
        self.tiles.copy_(tiles)
        self.shared.copy_(shared)

    def flags(self) -> Tensor:
        """(3, S) bool: finished, bad_hidden, bad_draw."""
        return torch.stack([self.finished, self.bad_hidden, self.bad_draw])

    def drawn(self, at: Tensor) -> tuple[Tensor, ...]:
        """Copies, of slots `at`, of tokens (K, L), lengths, terminated, log_behavior (K,), log_pf (K, L) and
        log_pterm (K, L + 1)."""
        whole = (self.tokens[:, :-1], self.lengths, self.terminated, self.log_behavior)
        return tuple(x.index_select(0, at) for x in (*whole, self.log_pf[:, :-1], self.log_pterm[:, :-1]))


def tiles_of(prompt: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """On the host: tiles (S, R) int32 and shared nodes (S,) int64 of slots with these prompts (S,), -1 for
    none, of `depth` (S,) nodes. Tiles of one prompt differ by one slot at most, so none has one slot."""
    tiles = torch.full((len(prompt), TILE_ROWS), -1, dtype=torch.int32)
    _, place, count = prompt.unique(return_inverse=True, return_counts=True)
    is_shared = (prompt >= 0) & (depth >= LEAST_SHARED) & (count[place] > 1)
    rows = is_shared.nonzero()[:, 0]
    rows = rows[prompt[rows].argsort(stable=True)]
    _, place, count = prompt[rows].unique(return_inverse=True, return_counts=True)
    parts = -(-count // TILE_ROWS)
    rank = torch.arange(len(rows)) - (count.cumsum(0) - count)[place]
    count, first_tile, parts = count[place], (parts.cumsum(0) - parts)[place], parts[place]
    part = rank * parts // count
    first = -(-part * count // parts)  # the lowest rank of this part
    tiles[first_tile + part, rank - first] = rows.int()
    return tiles, depth * is_shared


def most_tiles(count: Tensor, depth: Tensor, size: int) -> int:
    """Tiles that any `size` slots may have, for `count` (G,) trajectories below prompts of `depth` (G,)."""
    count = count.clamp(max=size)[(count > 1) & (depth >= LEAST_SHARED)]
    return min(int((count / TILE_ROWS).ceil().sum()), size // 2)


def step_of(
    policy: Policy, drawer: Drawer, kv: KeyValues, seed: Tensor, num_tiles: int = 0
) -> Callable[[Slots], None]:
    """The step over some slots: draws from their hidden states, notes the draws, computes the next states.

    seed: (1,) int64 on the device, in the place of the drawer's. num_tiles: most tiles of slots that read
    their prompt together, 0 where none do.
    """

    def step(slots: Slots) -> None:
        token = _draw(slots, drawer, seed)
        last = (slots.lengths - 1).clamp(min=0)
        length = slots.depth + last + 1
        # every tile has two slots or more
        tiles = slots.tiles[: min(num_tiles, len(slots) // 2)]
        shared = SharedPrompts(tiles, slots.shared) if len(tiles) else None
        attention = PathAttention(kv, slots.first + last, slots.path, length, shared)
        slots.hidden.copy_(policy.hidden(token, length - 1, attention))

    return step


def _draw(slots: Slots, drawer: Drawer, seed: Tensor) -> Tensor:
    """(S,) the tokens that the slots append, 0 where one appends none."""
    limits, idle = drawer.constraints, slots.finished
    longest, running = limits.max_length, ~idle
    diverged = ~slots.hidden.isfinite().all(1)
    slots.bad_hidden.logical_or_(running & diverged)
    draw = drawer.from_hidden(
        slots.hidden.masked_fill(diverged[:, None], 0.0),
        seed=seed,
        temperature=slots.temperature,
        trajectory=slots.trajectory,
        position=slots.lengths,
        forbid_termination=slots.lengths < limits.min_length,
    )
    # A GPU marks a draw without a token.
    bad, stops = draw.token < 0, draw.token == limits.termination_token_id
    slots.bad_draw.logical_or_(running & bad)
    slots.terminated.logical_or_(running & stops)
    ends = idle | bad | stops
    slots.log_behavior.add_(draw.log_behavior.masked_fill(idle, 0.0))
    state = slots.lengths.masked_fill(idle, longest + 1)[:, None]
    slots.log_pterm.scatter_(1, state, draw.log_pterm[:, None])
    place = slots.lengths.masked_fill(ends, longest)[:, None]
    slots.log_pf.scatter_(1, place, draw.log_pf[:, None])
    slots.tokens.scatter_(1, place, draw.token[:, None])
    slots.lengths.add_(~ends)
    # last, for `idle` is this tensor
    slots.finished.logical_or_(ends | (slots.lengths == longest))
    return draw.token.masked_fill(ends, 0)
