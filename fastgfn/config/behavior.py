"""What a step trains on: fresh draws, replay, local search, demonstrations."""

import math
from dataclasses import dataclass, fields

from fastgfn.config.settings import Settings, between

PRECISIONS = ("bfloat16", "int8", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Behavior(Settings):
    """The behaviour policy of a `Trainer`: which trajectories a step trains on.

    None of it moves the solution: where the loss is 0 on all sequences, it is 0 on whichever are looked at,
    as long as every one of them is drawn now and then. At finite capacity it says where the fit is good.
    A pair (start, end) is a schedule: start at step 0, end from its horizon on (optimiser steps), linear
    between; counts are rounded.
    """

    prompts_per_step: int = 1
    """Prompts in one micro-batch."""
    num_samples: int = 20
    """Sequences drawn per prompt and micro-batch. 0 draws none: replay or demonstrations are all there is."""
    tempered_share: tuple[float, float] = (0.5, 0.5)
    """Share of the drawn sequences whose temperature is uniform in temperature_range, the rest use 1: value
    at step 0 and value from tempered_horizon on, linear between."""
    tempered_horizon: int = 1
    """Optimiser steps over which the tempered share moves."""
    temperature_range: tuple[float, float] = (0.5, 2.0)
    """Sampling temperatures of the tempered share."""
    epsilon: tuple[float, float] = (0.0, 0.0)
    """Probability, in [0, 1], with which a token is drawn uniformly from the allowed ones instead of from the
    policy: value at step 0 and value from epsilon_horizon on, linear between."""
    epsilon_horizon: int = 1
    """Optimiser steps over which epsilon moves."""
    epsilon_share: float = 1.0
    """Share, in [0, 1], of each prompt's drawn sequences that epsilon applies to: the last ones, where
    tempered_share takes the first."""
    replay_samples: int = 0
    """Buffer entries added to each prompt's drawn sequences; 0 trains without a buffer."""
    replay_share: tuple[float, float] = (0.0, 0.0)
    """Instead of replay_samples, the share, in [0, 1), of drawn and replayed sequences together that is
    replayed: value at step 0 and value from replay_horizon on, linear between. 0.75 adds three entries to
    every sequence drawn, fewer while the buffer has fewer."""
    replay_horizon: int = 1
    """Optimiser steps over which the replay share moves."""
    replay_capacity: int = 50
    """Buffer entries kept per prompt."""
    replay_duplicates: str = "near"
    """What the buffer rejects: "near" (edit distance), "embedding" (cosine distance of the Trainer's `embed`)
    or "exact" duplicates."""
    replay_tolerance: float = 0.25
    """Edit distance below this share of both lengths, or cosine distance below it, makes a near-duplicate."""
    replay_priority: str = "reward"
    """Buffer draws are proportional to "reward" at its current temperature, "uniform", by "recency", or a
    "mix" of reward and recency."""
    replay_half_life: float = 10.0
    """Newer entries of the prompt that halve the weight of one by recency; 0: the newest ones."""
    replay_recency_share: float = 0.5
    """Share of the draws of "mix" that go by recency."""
    replay_selection: str = "top"
    """What of the draws is taken: "top" all, "length_balanced" equally many of every length, or a
    "submodular" choice of good, unlike ones among four times as many."""
    replay_keep: str = "top"
    """What stays in a full buffer: "top" the best, or the "submodular" choice."""
    replay_max_age: int | None = None
    """Optimiser steps after which an entry is removed unless it is drawn again; None: never."""
    local_search_samples: tuple[float, float] = (0, 0)
    """Sequences of each prompt that local search starts from: of each, a suffix is destroyed, the cut uniform
    over its places, and grown again by the policy. What is accepted joins the batch and the buffer. Value at
    step 0 and value from local_search_horizon on, linear between, rounded."""
    local_search_horizon: int = 1
    """Optimiser steps over which the number of searches moves."""
    local_search_from: str = "best"
    """What a search starts from: the "best" distinct sequences of this batch's draws by R, "random" ones of
    these draws, or the "buffer"."""
    local_search_accept: str = "better"
    """When a regrown sequence replaces the one before: "always", where its R is not worse ("better"), or with
    the probability that leaves R^(1/T) invariant ("metropolis"). All but "always" cost a reward of it."""
    local_search_rounds: int = 1
    """Times that every search cuts and regrows what it has; each accepted sequence joins the batch."""
    demonstration_samples: tuple[float, float] = (0, 0)
    """Demonstrations of each prompt that join every batch, chosen anew each time, all if there are fewer:
    value at step 0 and value from demonstration_horizon on, linear between, rounded."""
    demonstration_horizon: int = 1
    """Optimiser steps over which the number of demonstrations moves."""
    seed_prompt_samples: int = 20
    """Sequences drawn from every seed prompt before step 0."""
    seed_prompt_temperature: float = 1.0
    """Their sampling temperature."""
    importance_clip: tuple[float, float] | None = None
    """(low, high): every trajectory's loss is weighed with q(x) / (density it was drawn with), no less than
    low and no more than high; 1 where that density is not known. None: all alike, as the zero of the loss
    does not depend on it."""
    rollout_precision: str | None = None
    """Precision of the weights that sequences are drawn with: "bfloat16", "int8" (on a CPU), "float8_e4m3fn"
    (on a GPU), or None for the base's own. The loss does not see it; `drift` among the metrics says how far
    such a sampler is from the policy."""
    seed: int = 0
    """Of sampling, behaviour mix, replay and prompt order."""

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, field.type)
        self._check_ranges()
        self._check_choices()
        self._check_together()

    def _check_ranges(self) -> None:
        horizons = (f.name for f in fields(self) if f.name.endswith("_horizon"))
        for field in ("prompts_per_step", "replay_capacity", "local_search_rounds", *horizons):
            self._need(getattr(self, field) >= 1, field, ">= 1")
        for field in ("num_samples", "replay_samples", "seed_prompt_samples", "seed"):
            self._need(getattr(self, field) >= 0, field, ">= 0")
        self._need(self.seed < 2**63, "seed", "below 2^63")
        self._need(self.replay_half_life >= 0, "replay_half_life", ">= 0")
        aged = self.replay_max_age is None or self.replay_max_age >= 1
        self._need(aged, "replay_max_age", ">= 1 or None")
        for field in ("tempered_share", "epsilon"):
            self._pair(field, lambda v: 0.0 <= v <= 1.0, "two numbers in [0, 1]")
        self._pair("replay_share", lambda v: 0.0 <= v < 1.0, "two numbers in [0, 1)")
        for field in ("local_search_samples", "demonstration_samples"):
            self._pair(field, lambda v: math.isfinite(v) and v >= 0, "two numbers >= 0")
        for field in ("epsilon_share", "replay_tolerance", "replay_recency_share"):
            self._need(0.0 <= getattr(self, field) <= 1.0, field, "in [0, 1]")
        self._pair("temperature_range", lambda v: math.isfinite(v) and v > 0, "two numbers > 0")
        self._need(self.temperature_range[0] <= self.temperature_range[1], "temperature_range", "ascending")
        self._need(self.seed_prompt_temperature > 0, "seed_prompt_temperature", "> 0")
        low, high = self.importance_clip or (0.0, 1.0)
        self._need(
            0.0 <= low <= high and high > 0, "importance_clip", "ascending, not negative, the last > 0"
        )

    def _check_choices(self) -> None:
        for field, known in (
            ("replay_duplicates", ("near", "exact", "embedding")),
            ("replay_priority", ("reward", "uniform", "recency", "mix")),
            ("replay_selection", ("top", "submodular", "length_balanced")),
            ("replay_keep", ("top", "submodular")),
            ("local_search_from", ("best", "random", "buffer")),
            ("local_search_accept", ("always", "better", "metropolis")),
        ):
            self._need(getattr(self, field) in known, field, " or ".join(map(repr, known)))
        known_or_none = self.rollout_precision in (None, *PRECISIONS)
        self._need(known_or_none, "rollout_precision", f"one of {PRECISIONS} or None")

    def _check_together(self) -> None:
        """Refuse settings that contradict each other."""
        share, searches = max(self.replay_share), max(self.local_search_samples)
        either = not (self.replay_samples and share)
        self._need(either, "replay_share", "(0, 0) beside replay_samples", "set one of the two")
        most = replayed(self.num_samples, share)
        want = f">= {most}, what replay_share={share} adds to num_samples={self.num_samples}"
        self._need(self.replay_capacity >= most, "replay_capacity", want, "raise it or lower replay_share")
        if self.num_samples == 0:
            shown = round(min(self.demonstration_samples)) > 0
            fix = "draw some, or set replay_samples or demonstration_samples"
            want = ">= 1, or 0 where something else is trained on at every step"
            self._need(self.replay_samples > 0 or shown, "num_samples", want, fix)
            ages = self.replay_max_age is not None and not (shown or searches)
            want = "None where num_samples is 0, which stores nothing new"
            self._need(not ages, "replay_max_age", want, "draw some")
            fix = "draw some, or set replay_samples"
            self._need(share == 0, "replay_share", "(0, 0) where num_samples is 0", fix)
            self._need(max(self.epsilon) == 0, "epsilon", "(0, 0) where num_samples is 0", "draw some")
        elif max(self.epsilon) > 0:
            explores = round(self.epsilon_share * self.num_samples) > 0
            want = f"a share that is one of num_samples={self.num_samples} at least, with epsilon"
            self._need(explores, "epsilon_share", want, "raise it or leave epsilon out")
        if searches and self.local_search_from == "buffer":
            fix = "set replay_samples or replay_share"
            self._need(self.uses_buffer, "local_search_from", "'best' or 'random' without replay", fix)
        elif searches:
            want = (
                f"at most num_samples = {self.num_samples} with local_search_from={self.local_search_from!r}"
            )
            fix = "lower it, draw more or search from the buffer"
            self._need(searches <= self.num_samples, "local_search_samples", want, fix)

    @property
    def uses_buffer(self) -> bool:
        """Whether sequences are kept and replayed."""
        return self.replay_samples > 0 or max(self.replay_share) > 0

    @property
    def most_per_prompt(self) -> int:
        """Fresh, replayed and demonstrated sequences of a prompt at most."""
        given = self.replay_samples + round(max(self.demonstration_samples))
        return self.num_samples + given + replayed(self.num_samples, max(self.replay_share))

    def tempered_share_at(self, step: int) -> float:
        return between(self.tempered_share, step / self.tempered_horizon)

    def epsilon_at(self, step: int) -> float:
        return between(self.epsilon, step / self.epsilon_horizon)

    def replay_samples_at(self, step: int) -> int:
        """Buffer entries that are added for each prompt, if there are so many."""
        share = between(self.replay_share, step / self.replay_horizon)
        return self.replay_samples + replayed(self.num_samples, share)

    def local_search_samples_at(self, step: int) -> int:
        return round(between(self.local_search_samples, step / self.local_search_horizon))

    def demonstration_samples_at(self, step: int) -> int:
        return round(between(self.demonstration_samples, step / self.demonstration_horizon))


def replayed(num_samples: int, share: float) -> int:
    """Sequences that make up `share` of the whole together with `num_samples` others."""
    return round(num_samples * share / (1.0 - share))
