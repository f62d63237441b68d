"""What users may plug into sampling beside drafts: grammars and tools."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Grammar(Protocol):
    """Which tokens may follow, a part of the policy q: log-probs are renormalised over them."""

    def allowed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(K, V) bool for K prefixes of Z, the termination token's column included; none may be all False."""


class Tool(Protocol):
    """Called after every drawn token that does not end its trajectory."""

    def __call__(self, trajectory: int, sequence: Sequence[int]) -> Sequence[int] | None:
        """Tokens to append as observations, which are no actions and carry no log q; None or empty for none.

        sequence: the tokens of Z so far.
        """
