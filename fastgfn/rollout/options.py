"""How trajectories are drawn beyond the policy itself. None of it changes the policy q that a loss sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgfn import checks


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Of the behaviour policy; every default leaves it the policy at the given temperature.

    top_k, top_p, min_p: as in `functional.sample_next`, at the temperature. Such a behaviour lacks support:
        train with a share of unfiltered trajectories.
    epsilon: share of draws that are uniform over the tokens that `logit_bias` leaves (those with a bias above
        -30 nats) and that the length limits allow. The density is that of the mixture.
    prefixes: per trajectory the first tokens of Z, taken as they are, or None. They carry log q, and nothing
        to log_behavior.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    epsilon: float = 0.0
    prefixes: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        fix = "0 never draws uniformly"
        in_range = 0.0 <= self.epsilon <= 1.0
        checks.check(in_range, "SamplingOptions", "epsilon", "in [0, 1]", self.epsilon, fix)
        for name, value, ok, want in (
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, ">= 1 or None"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "in (0, 1] or None"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1] or None"),
        ):
            checks.check(ok, "SamplingOptions", name, want, value, "None switches it off")

    @property
    def filters(self) -> dict[str, int | float | None]:
        return {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    @property
    def needs_logits(self) -> bool:
        return self.epsilon > 0 or any(value is not None for value in self.filters.values())
