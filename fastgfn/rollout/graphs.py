"""Steps as CUDA graphs, and the memory whose addresses these hold, which a policy keeps between calls."""

import copy
from collections.abc import Callable
from dataclasses import fields

import torch

from fastgfn.attention import KeyValues
from fastgfn.functional.values import is_debug
from fastgfn.models import Policy
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.slots import Slots, step_of

# The path table is wider by up to this, so that other prompts fit.
WIDTHS = 32


class Workspace:
    """Pool, slots, mask, seed and steps for `size` slots: what stays where it is while draws change.

    `Workspace.of` returns the one that a policy kept if it fits, with its graphs.
    """

    def __init__(
        self, policy: Policy, drawer: Drawer, size: int, capacity: int, width: int, num_tiles: int = 0
    ) -> None:
        self.policy = policy
        self.key = self.key_of(policy, drawer, size)
        self.size, self.capacity, self.width, self.num_tiles = size, capacity, width, num_tiles
        self.kv = KeyValues(capacity)
        self.drawer = copy.copy(drawer)
        if drawer.logit_bias is not None:
            self.drawer.logit_bias = drawer.logit_bias.clone()
        self.seed = torch.full((1,), drawer.seed, dtype=torch.int64, device=policy.device)
        self.slots: Slots | None = None
        self.steps = Steps(step_of(policy, self.drawer, self.kv, self.seed, num_tiles), policy.device)

    @staticmethod
    def key_of(policy: Policy, drawer: Drawer, size: int) -> tuple:
        """What a graph holds besides the memory here."""
        limits, bias = drawer.constraints, drawer.logit_bias
        bias = None if bias is None else (bias.shape, bias.dtype)
        numbers = limits.termination_token_id, limits.min_length, limits.max_length
        return size, numbers, bias, is_debug(), policy.addresses()

    @classmethod
    def of(
        cls, policy: Policy, drawer: Drawer, size: int, capacity: int, width: int, num_tiles: int = 0
    ) -> "Workspace":
        """`capacity` nodes or more, paths of `width` or more, as many tiles of `step_of` or more."""
        kept, policy.kept = policy.kept, None
        if isinstance(kept, cls) and kept.key == cls.key_of(policy, drawer, size):
            has, wanted = (kept.capacity, kept.width, kept.num_tiles), (capacity, width, num_tiles)
            if all(map(int.__ge__, has, wanted)):
                kept._renew(drawer)
                return kept
            # Prompts vary: soon all fit.
            capacity, width, num_tiles = map(max, has, wanted)
        kept = None  # free before the next is made
        return cls(policy, drawer, size, capacity, -(-width // WIDTHS) * WIDTHS, num_tiles)

    def _renew(self, drawer: Drawer) -> None:
        self.seed.fill_(drawer.seed)
        if drawer.logit_bias is not None:
            self.drawer.logit_bias.copy_(drawer.logit_bias)
        if self.slots is not None:
            self.slots.clear()

    def begin(self, like: torch.Tensor) -> Slots:
        """The empty slots; `like` is a hidden state (..., D)."""
        if self.slots is None:
            max_length = self.drawer.constraints.max_length
            self.slots = Slots.empty(self.size, self.width, max_length, like=like)
        return self.slots

    def keep(self) -> None:
        """For the next call, if graphs were made and the memory may stay taken."""
        if any(graph is not None for graph in self.steps.graphs.values()):
            if self.policy.may_keep(self.num_bytes):
                self.policy.kept = self

    @property
    def num_bytes(self) -> int:
        tensors = [x for pair in self.kv.layers.values() for x in pair]
        if self.slots is not None:
            tensors += [getattr(self.slots, f.name) for f in fields(self.slots)]
        return sum(x.numel() * x.element_size() for x in tensors)


class Steps:
    """Runs the step. On CUDA, per number of slots, the first runs as it is, on a stream of its own, which
    compiles kernels; the second is captured as a graph, which serves from then on.

    The graphs hold the addresses of the slots, the pool and the weights.
    """

    def __init__(self, step: Callable[[Slots], None], device: torch.device) -> None:
        self.step = step
        # What FASTGFN_DEBUG=1 reads cannot be captured.
        self.uses_graphs = device.type == "cuda" and not is_debug()
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        if self.uses_graphs:
            self.stream = torch.cuda.Stream(device)
            self.memory = torch.cuda.graph_pool_handle()

    def __call__(self, slots: Slots) -> None:
        size = len(slots)
        if not self.uses_graphs:
            self.step(slots)
        elif size not in self.graphs:
            self._warm_up(slots)
            self.graphs[size] = None
        else:
            if self.graphs[size] is None:
                self.graphs[size] = self._captured(slots)
            self.graphs[size].replay()

    def _warm_up(self, slots: Slots) -> None:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step(slots)
        current.wait_stream(self.stream)

    def _captured(self, slots: Slots) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        options = dict(pool=self.memory, stream=self.stream, capture_error_mode="thread_local")
        # Casts that autocast keeps are those of older weights, in memory that goes when autocast ends.
        keeps_casts = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, **options):
                self.step(slots)
        finally:
            torch.set_autocast_cache_enabled(keeps_casts)
        return graph
