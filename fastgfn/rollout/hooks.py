"""What users may plug into sampling: grammars, tools and sources of drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from torch import Tensor

from fastgfn import checks


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


class DraftSource(Protocol):
    """Guesses of what a row will draw, checked by the policy in the pass that computes the row anyway."""

    def propose(self, prefixes: Sequence[Sequence[int]], counts: Sequence[int]) -> Sequence[Sequence[int]]:
        """For each prefix, prompt and Z, up to counts[i] tokens that may follow one another."""


class PromptLookup:
    """Drafts what followed the last tokens where they stood before in the same text.

    ngram: the longest context looked for; shorter ones follow, down to one token. O(length) per row and step.
    Source: prompt lookup decoding (Saxena 2023).
    """

    def __init__(self, ngram: int = 3) -> None:
        checks.check(ngram >= 1, "PromptLookup", "ngram", ">= 1", ngram, "raise it")
        self.ngram = ngram

    def propose(self, prefixes: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
        return [self._after(list(p), n) for p, n in zip(prefixes, counts, strict=True)]

    def _after(self, text: list[int], count: int) -> list[int]:
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            last = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == last:
                    return text[start + size : start + size + count]
        return []


@dataclass(slots=True)
class Drafts:
    """A source and how far it looks ahead; `sample` counts in it what was offered and what was accepted.

    A draft is accepted if the policy draws that very token, from the noise that it would draw from without
    drafts, so drafts change the speed and never the draws.
    """

    source: DraftSource
    length: int = 4
    offered: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        checks.check(self.length >= 1, "Drafts", "length", ">= 1", self.length, "raise it")

    @property
    def acceptance(self) -> float:
        """Share of the offered tokens that were drawn; nan before the first."""
        return self.accepted / self.offered if self.offered else float("nan")

    def propose(self, prefixes, counts, vocab: int, stops: Sequence[int]) -> list[list[int]]:
        """Checked drafts, cut at the first termination token."""
        counts = [min(self.length, n) for n in counts]
        found = [list(d) for d in self.source.propose(prefixes, counts)]
        fix = "return one list per prefix"
        checks.check(len(found) == len(counts), "Drafts", "drafts", f"{len(counts)} lists", len(found), fix)
        for i, (draft, count) in enumerate(zip(found, counts, strict=True)):
            ok = len(draft) <= count and all(0 <= t < vocab for t in draft)
            want = f"at most {count} ids in [0, {vocab})"
            checks.check(ok, "Drafts", f"drafts[{i}]", want, draft[:20], "use this model's token ids")
            found[i] = list(takewhile(lambda t: t not in stops, draft))
        self.offered += sum(map(len, found))
        return found
