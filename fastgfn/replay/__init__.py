"""A per-prompt replay buffer: a lay-by between sampling and packing."""

from fastgfn.replay.buffer import Entry, ReplayBuffer

__all__ = ["Entry", "ReplayBuffer"]
