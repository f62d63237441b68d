"""What users may plug into sampling, beside grammars (fastgfn.types) and drafts: tools."""

from collections.abc import Sequence
from typing import Protocol


class Tool(Protocol):
    """Called after every drawn token that does not end its trajectory."""

    def __call__(self, trajectory: int, sequence: Sequence[int]) -> Sequence[int] | None:
        """Tokens to append as observations, which are no actions and carry no log q; None or empty for none.

        sequence: the tokens of Z so far.
        """
