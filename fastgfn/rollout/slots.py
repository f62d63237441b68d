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
from fastgfn.rollout.draws import Drawer


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
        """Put slots `at` (K,) first, in this order. The nodes stay where they are: the paths lead there."""
        for f in fields(self):
            whole = getattr(self, f.name)
            whole[: len(at)].copy_(whole.index_select(0, at))

    def flags(self) -> Tensor:
        """(3, S) bool: finished, bad_hidden, bad_draw."""
        return torch.stack([self.finished, self.bad_hidden, self.bad_draw])

    def drawn(self, at: Tensor) -> tuple[Tensor, ...]:
        """Copies, of slots `at`, of tokens (K, L), lengths, terminated, log_behavior (K,), log_pf (K, L) and
        log_pterm (K, L + 1)."""
        whole = (self.tokens[:, :-1], self.lengths, self.terminated, self.log_behavior)
        return tuple(x.index_select(0, at) for x in (*whole, self.log_pf[:, :-1], self.log_pterm[:, :-1]))


def step_of(policy: Policy, drawer: Drawer, kv: KeyValues, seed: Tensor) -> Callable[[Slots], None]:
    """The step over some slots: draws from their hidden states, notes the draws, computes the next states.

    seed: (1,) int64 on the device, in the place of the drawer's.
    """

    def step(slots: Slots) -> None:
        token = _draw(slots, drawer, seed)
        last = (slots.lengths - 1).clamp(min=0)
        length = slots.depth + last + 1
        attention = PathAttention(kv, slots.first + last, slots.path, length)
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
