"""What is minimised: the objective and its options."""

from dataclasses import dataclass, fields

from fastgfn.config.behavior import Behavior

# The objectives, and by which of its arguments the loss of each takes which of the settings below.
_WINDOWS = {"subtb_lambda": "subtb_lambda"}
OBJECTIVES: dict[str, dict[str, str]] = {
    "modified_subtb": _WINDOWS | {"include_sink": "include_sink"},
    "modified_db": {},
    "subtb": _WINDOWS,
    "db": {},
    "tb": {},
    "vargrad": {},
    "rtb": {"rtb_beta": "beta"},
    "length_normalized_tb": {"rtb_beta": "beta"},
    "rooted_prefix_tb": {
        "rooted_eta": "prefix_weight",
        "rooted_first": "k_min",
        "rooted_last": "k_max",
        "rooted_gamma": "gamma",
        "rooted_missing_reward": "missing_reward",
    },
    "interpolated_subtb": _WINDOWS | {"interpolation_segment": "segment"},
}
RESIDUAL_LOSSES = ("squared", "half_squared", "huber", "shifted_cosh", "linex", "clamped")
LOG_Z = ("estimate", "scalar", "per_prompt", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(Behavior):
    """The objective of a `Trainer` on what its `Behavior` draws."""

    objective: str = "modified_subtb"
    """What is balanced, see fastgfn.objectives. Every prefix, which needs a reward of its own:
    "modified_subtb", "modified_db", "rooted_prefix_tb", "interpolated_subtb". Whole sequences, of which a
    reward is enough: "vargrad" (two at least of a prompt), "tb" (a learned log_z), "rtb" (against the base
    model), "length_normalized_tb". With flows that a head learns (log_z="head"): "subtb", "db"."""
    subtb_lambda: float = 1.0
    """Window weight lambda^(k-1) of "modified_subtb" and "subtb", in [0, 1]."""
    include_sink: bool = False
    """The second mask convention of the published code for "modified_subtb": the state after the stop counts
    as one more."""
    residual_loss: str = "squared"
    """What a residual costs: "squared", "half_squared", "huber", "shifted_cosh", "linex" or "clamped"."""
    residual_limit: float | None = None
    """Nats beyond which a "clamped" residual has no gradient; None is the loss's own limit."""
    rtb_beta: float = 1.0
    """Factor of log R in "rtb" and "length_normalized_tb"."""
    rooted_eta: float = 0.25
    """Weight of the prefixes beside the whole sequence in "rooted_prefix_tb"."""
    rooted_first: int = 2
    """Tokens of the shortest prefix that takes part in "rooted_prefix_tb"."""
    rooted_last: int | None = None
    """Tokens of the longest one; None: every prefix."""
    rooted_gamma: float = 0.99
    """Discount per token of what "rooted_prefix_tb" expects of prefixes without a reward of their own, in
    [0, 1]."""
    rooted_missing_reward: float = 0.0
    """log R, tempered, by which "rooted_prefix_tb" knows them."""
    interpolation_segment: int = 8
    """Tokens between the prefixes whose reward "interpolated_subtb" reads."""
    log_z: str = "estimate"
    """Where the objective reads log Z(X): "estimate" (the mean over a prompt's sequences, nothing to learn),
    or learned: one "scalar", one "per_prompt", or a "head" on the hidden states and the length of Z, which
    also gives the flows of "subtb" and "db". Learned values start at the estimate of the first batch that has
    the prompt."""
    log_z_learning_rate: float = 0.1
    """Adam step size of a learned log Z(X) and of flows at its peak, in nats; it follows `schedule`."""
    normalization: str = "group"
    """How windows (or sequences) are pooled: "group", "batch" or "trajectory"."""

    def __post_init__(self) -> None:
        Behavior.__post_init__(self)
        self._check_objective()
        self._need(0.0 <= self.subtb_lambda <= 1.0, "subtb_lambda", "in [0, 1]")
        names = ("group", "batch", "trajectory")
        self._need(self.normalization in names, "normalization", f"one of {names}")

    def _check_objective(self) -> None:
        """That what is set is read, and what is read is set."""
        self._need(self.objective in OBJECTIVES, "objective", f"one of {tuple(OBJECTIVES)}")
        self._need(self.residual_loss in RESIDUAL_LOSSES, "residual_loss", f"one of {RESIDUAL_LOSSES}")
        self._need(self.log_z in LOG_Z, "log_z", f"one of {LOG_Z}")
        for field in ("rtb_beta", "log_z_learning_rate"):
            self._need(getattr(self, field) > 0, field, "> 0")
        for field in ("rooted_first", "interpolation_segment"):
            self._need(getattr(self, field) >= 1, field, ">= 1")
        self._need(self.rooted_eta >= 0, "rooted_eta", ">= 0")
        self._need(0.0 <= self.rooted_gamma <= 1.0, "rooted_gamma", "in [0, 1]")
        last = self.rooted_last is None or self.rooted_last >= self.rooted_first
        self._need(last, "rooted_last", ">= rooted_first or None")
        with_objective = f"with objective={self.objective!r}"
        for field in fields(self):
            readers = tuple(name for name, reads in OBJECTIVES.items() if field.name in reads)
            unread = readers and self.objective not in readers and getattr(self, field.name) != field.default
            self._need(not unread, field.name, f"{field.default!r} {with_objective}; it is of {readers}")
        clamped = self.residual_limit is None or self.residual_loss == "clamped"
        self._need(clamped, "residual_limit", "None without residual_loss='clamped'")
        self._need(self.residual_limit is None or self.residual_limit > 0, "residual_limit", "> 0 or None")
        learned = self.log_z != "estimate"
        want = "learned ('scalar', 'per_prompt' or 'head')"
        rate = type(self).__dataclass_fields__["log_z_learning_rate"].default
        alone = learned or self.log_z_learning_rate == rate
        self._need(alone, "log_z_learning_rate", f"{rate} with log_z='estimate', which learns nothing")
        self._need(
            learned or self.objective != "tb", "log_z", f"{want} {with_objective}; 'vargrad' estimates it"
        )
        flows = self.objective in ("subtb", "db")
        self._need(
            not flows or self.log_z == "head", "log_z", f"'head', whose flows it reads, {with_objective}"
        )
        self._need(
            not learned or self.objective != "vargrad", "log_z", f"'estimate' {with_objective}; try 'tb'"
        )
        whole = self.objective in ("vargrad", "rtb", "length_normalized_tb", "rooted_prefix_tb")
        pairs = not whole or learned or self.most_per_prompt >= 2
        self._need(pairs, "num_samples", f">= 2 {with_objective}")

    @property
    def objective_options(self) -> dict[str, float | str | bool | None]:
        """The further arguments of the objective's loss."""
        names = OBJECTIVES[self.objective] | dict(
            residual_loss="residual_loss", residual_limit="residual_limit"
        )
        return {argument: getattr(self, field) for field, argument in names.items()}
