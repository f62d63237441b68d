"""The running batch on a GPU: a slot per trajectory, steps of static shape, a host that looks now and then.

The host queues steps, as replays of a CUDA graph, and looks at flags that are a few steps old: it fetches
finished trajectories and fills their slots with waiting ones while the GPU works. Prompts are computed once
and shared, as in `Engine`, and long ones are read once for all their slots; rows are not shared, because to
find equal rows is to read every token.
"""

import contextlib

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.rollout.draws import Drawer, check_drawn, check_finite
from fastgfn.rollout.engine import REFILL_SHARE, Engine, Request, prompt_nodes
from fastgfn.rollout.graphs import Workspace
from fastgfn.rollout.nodes import NodePool
from fastgfn.rollout.slots import Slots, most_tiles, tiles_of
from fastgfn.types import Rollouts

# Steps between two looks, while trajectories wait; half of it after that.
POLL_EVERY = 8
# Numbers of slots that steps are captured for; above the last, its multiples.
BUCKETS = tuple(2**i for i in range(10))
# Fewer slots cost a GPU the same: the tiles of its products have 16 rows.
LEAST_MOVED = 16


def bucket(count: int) -> int:
    """The least number of slots for `count` trajectories."""
    largest = BUCKETS[-1]
    return next((size for size in BUCKETS if count <= size), -(-count // largest) * largest)


class StaticEngine(Engine):
    """`Engine` for GPUs, without hooks, given prefixes and options that need logits; same result.

    A request without these, and a policy with `has_static_step`.
    """

    def __init__(
        self, policy: Policy, request: Request, drawer: Drawer, batch_size: int, poll_every: int = POLL_EVERY
    ) -> None:
        checks.check(poll_every >= 1, "StaticEngine", "poll_every", ">= 1", poll_every, "raise it")
        self.poll_every = poll_every
        self.num_moves = 0
        super().__init__(policy, request, drawer, batch_size)

    def _reset(self) -> None:
        """Empty slots; every unfinished trajectory waits."""
        self.size = bucket(self.batch_size)
        capacity = self.capacity(self.request, self.batch_size)
        self.pool = NodePool(capacity)
        # The slots have the first nodes, whatever the prompts.
        self.pool.take(self.size * self.max_length)
        self.workspace: Workspace | None = None  # all that there is memory for
        self.running: Slots | None = None  # the first `size` of its slots
        self.holds = torch.full((self.size,), -1)  # trajectory in each slot
        self.age = torch.zeros(self.size, dtype=torch.int64)  # steps since it began
        self.depth = torch.tensor([len(p) for p in self.request.distinct])  # nodes of each prompt
        self.fetched: list[tuple[Tensor, HostCopy]] = []
        self.resident = {}
        self.waiting = (~self.trajectories.finished).nonzero()[:, 0]

    @property
    def alive(self) -> Tensor:
        """Trajectories that are in a slot."""
        return self.holds[self.holds >= 0]

    @staticmethod
    def capacity(request: Request, batch_size: int) -> int:
        """Most nodes at a time: the longest prompts that may run, one more, and every slot's tokens."""
        return prompt_nodes(request, batch_size) + bucket(batch_size) * request.constraints.max_length

    def run(self) -> Rollouts:
        device = self.policy.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            found = super().run()
            self.workspace.keep()
        return found

    def _start_again(self, error: Exception) -> None:
        self._keep_fetched()
        super()._start_again(error)

    def _admit(self) -> None:
        """Fill empty slots with waiting trajectories, in order."""
        new = self._next()
        if not len(new):
            return
        self.waiting = self.waiting[len(new) :]
        self._open()
        prompts = self._prompts_of(new)
        wanted = prompts.unique().tolist()
        self._prefill_missing(wanted)
        rows = [self.resident[p] for p in prompts.tolist()]
        if self.running is None:
            self.running = self.workspace.begin(like=rows[0].hidden)
        at = (self.holds < 0).nonzero()[: len(new), 0]
        request = self.request
        numbers = (
            at,
            torch.cat([r.path for r in rows]),
            torch.cat([r.length for r in rows]),
            request.first_trajectory + new,
            request.temperature[new],
        )
        at_device, path, depth, trajectory, temperature = (self._on_device(x) for x in numbers)
        hidden = torch.cat([r.hidden for r in rows])
        self.running.fill(at_device, hidden, path, depth, trajectory, temperature)
        self.holds[at] = new
        self.age[at] = 0
        self._share()

    def _open(self) -> None:
        """Take the workspace, once the weights are merged."""
        if self.workspace is None:
            capacity = self.capacity(self.request, self.batch_size)
            width = int(self.depth.max()) + self.max_length
            count = self.request.prompt_of_group[self.request.group].bincount(minlength=len(self.depth))
            tiles = most_tiles(count, self.depth, self.batch_size)
            self.workspace = Workspace.of(self.policy, self.drawer, self.size, capacity, width, tiles)
            self.kv, self.width = self.workspace.kv, self.workspace.width

    def _share(self) -> None:
        """Say which slots read their prompt together. Those that finish later are of no use, and may stay."""
        if self.workspace.num_tiles == 0:
            return
        prompt = torch.where(self.holds >= 0, self._prompts_of(self.holds.clamp(min=0)), -1)
        tiles, shared = tiles_of(prompt, self.depth[prompt])
        self.running.share(self._on_device(tiles), self._on_device(shared))

    def _next(self) -> Tensor:
        """Trajectories that there is room for. A prefill waits until it fills some share of the batch."""
        room = self.batch_size - len(self.alive)
        new = self.waiting[:room]
        if len(self.alive) and room < self.batch_size * REFILL_SHARE:
            is_there = torch.tensor([p in self.resident for p in self._prompts_of(new).tolist()])
            new = new[is_there.cumprod(0).bool()] if len(new) else new
        return new

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A copy for the GPU that the host does not wait for."""
        device = self.policy.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def _step(self) -> None:
        """Queue some steps, then look at how things stood before them."""
        flags = HostCopy(self.running.flags())
        left = (self.max_length - self.age)[self.holds >= 0].max()
        count = min(self.poll_every if len(self.waiting) else -(-self.poll_every // 2), int(left))
        for _ in range(count):
            self.workspace.steps(self.running)
        self.age += count
        self._harvest(*flags.read()[0])
        if not len(self.waiting):
            self._move()

    def _harvest(self, finished: Tensor, bad_hidden: Tensor, bad_draw: Tensor) -> None:
        """Fetch what the slots that are finished have drawn, and empty them."""
        self._keep_fetched()
        check_finite(not bool(bad_hidden.any()))
        check_drawn(not bool(bad_draw.any()))
        done = (finished & (self.holds >= 0)).nonzero()[:, 0]
        if len(done):
            drawn = HostCopy(*self.running.drawn(self._on_device(done)))
            self.fetched.append((self.holds[done], drawn))
            self.holds[done] = -1
            needed = torch.cat([self.alive, self.waiting])
            needed = set(self._prompts_of(needed).unique().tolist())
            for prompt in [p for p in self.resident if p not in needed]:
                self.pool.release(self.resident.pop(prompt).node)
        if not len(self.alive):
            self._keep_fetched()

    def _keep_fetched(self) -> None:
        for trajectories, drawn in self.fetched:
            self.trajectories.finish(trajectories, *drawn.read())
        self.fetched = []

    def _move(self) -> None:
        """Go on with fewer slots where fewer than half of them run, unless the end is near."""
        held = self.holds >= 0
        count = int(held.sum())
        size = max(bucket(count), min(LEAST_MOVED, self.size))
        if not count or 2 * count >= self.size or size >= self.size:
            return
        # A new graph costs two steps that are launched kernel by kernel.
        if int((self.max_length - self.age)[held].max()) <= self.poll_every:
            return
        at = torch.cat([held.nonzero()[:, 0], (~held).nonzero()[:, 0]])[:size]
        self.running.move(self._on_device(at))
        self.running, self.size = self.running.start(size), size
        self.holds, self.age = self.holds[at], self.age[at]
        self._share()
        self.num_moves += 1


class HostCopy:
    """Copies of tensors of the device on the host; `read` waits for what was queued before them, no more."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.event = tensors, None
        if tensors[0].is_cuda:
            self.tensors = tuple(
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            )
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> tuple[Tensor, ...]:
        if self.event is not None:
            self.event.synchronize()
        return self.tensors
