"""A per-prompt replay buffer: a lay-by between sampling and packing.

It stores token sequences with the un-tempered factors of log R, so that a change of the temperatures
re-applies on replay, the policy version that drew them and the density that did. Randomness comes from the
caller.
"""

from fastgfn.replay.buffer import ReplayBuffer
from fastgfn.replay.entries import Entry
from fastgfn.replay.selection import Submodular

__all__ = ["Entry", "ReplayBuffer", "Submodular"]
