"""What crosses a stage boundary. Every object is frozen; data moves right only.

Dimension letters, used in every docstring of the package:
    G prompts (groups), N trajectories, L padded trajectory length, T nodes of the token tree (or padded
    transitions in `functional`), V vocabulary, D hidden width, R rows of hidden states, M targets.
All log quantities are natural logarithms (nats).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from fastgfn import checks


class Role(IntEnum):
    """What a node of the token tree is."""

    PROMPT = 0
    ACTION = 1
    OBSERVATION = 2
    SUFFIX = 3


class Grammar(Protocol):
    """Which tokens may follow, a part of the policy q: log-probs are renormalised over them."""

    def allowed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(K, V) bool for K prefixes of Z, the termination token's column included; none may be all False.

        A function of the prefix alone: `sample` asks about it, `pack` once more.
        """


@dataclass(frozen=True, slots=True)
class Constraints:
    """The set of sequences Z that the policy q is defined on; the sampled and the scored policy share it.

    termination_token_id: the token that ends a sequence; it never is part of Z.
    min_length: fewest tokens of Z. Shorter prefixes cannot stop.
    max_length: most tokens of Z.
    termination: "forced" (default): the limits belong to q, so stopping is impossible (probability 0, the
        other tokens renormalised) below min_length and certain (log_pterm = 0) at max_length.
        "own": the published convention; the limits bind the sampler only and log_pterm stays the model's own.
        A loss of 0 then does not make what is drawn R's posterior.
    logit_bias: (V,) float32 added to the logits before the softmax (a vocabulary mask, e.g. -99), or None.
    extra_termination_token_ids: further tokens that end a sequence and never are part of it; q(stop) is the
        sum of the probabilities of all of them.
    """

    termination_token_id: int
    min_length: int = 0
    max_length: int = 32
    termination: str = "forced"
    logit_bias: Tensor | None = None
    extra_termination_token_ids: tuple[int, ...] = ()

    @property
    def termination_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a sequence, `termination_token_id` first."""
        return (self.termination_token_id, *self.extra_termination_token_ids)

    def __post_init__(self) -> None:
        checks.check(
            self.min_length >= 0, "Constraints", "min_length", ">= 0", self.min_length, "raise it to 0"
        )
        checks.check(
            self.max_length >= max(1, self.min_length),
            "Constraints",
            "max_length",
            f">= max(1, min_length) = {max(1, self.min_length)}",
            self.max_length,
            "raise max_length or lower min_length",
        )
        checks.check(
            self.termination in ("forced", "own"),
            "Constraints",
            "termination",
            "'forced' or 'own'",
            repr(self.termination),
            "use 'forced' unless you compare with the published code",
        )
        checks.check(
            self.termination_token_id >= 0,
            "Constraints",
            "termination_token_id",
            ">= 0",
            self.termination_token_id,
            "pass the id of the token that ends a sequence",
        )
        extra = self.extra_termination_token_ids
        is_tuple = isinstance(extra, tuple) and all(type(i) is int for i in extra)
        checks.check(
            is_tuple,
            "Constraints",
            "extra_termination_token_ids",
            "a tuple of ids",
            repr(extra),
            "pass (id, ...)",
        )
        ids = self.termination_token_ids
        checks.check(
            len(set(ids)) == len(ids) and min(ids) >= 0,
            "Constraints",
            "extra_termination_token_ids",
            f"distinct ids >= 0 without {self.termination_token_id}",
            self.extra_termination_token_ids,
            "list every further token once",
        )


@dataclass(frozen=True, slots=True)
class Rollouts:
    """N sampled sequences over G prompts.

    prompts: G tensors (P_g,) int64.
    group: (N,) int64, which prompt each sequence continues.
    tokens: (N, L) int64, the tokens of Z, without the termination token; content past `lengths` is undefined.
    lengths: (N,) int64, number of tokens of Z.
    log_behavior: (N,) float32, log-density of the distribution that drew the sequence, the stop included.
    constraints: the sequence set they were drawn from.
    log_pf: (N, L) float32, log q of every token at temperature 1 as the sampler saw it (weights merged, in
        its precision), 0 past `lengths`; None for sequences that were not drawn. For diagnostics: what enters
        a loss comes from `score`.
    log_pterm: (N, L + 1) float32, likewise log q(stop) after 0, 1, ... tokens, up to `lengths`; nan past it,
        and at L under "own" termination, where the sampler never looks.
    terminated: (N,) bool, the sequence drew the termination token (False: max_length ended it), or None.
    is_action: (N, L) bool, tokens that the policy chose; False on what a tool returned and past `lengths`.
        None: every token is an action.
    has_grammar: drawn under a grammar, which `pack` needs.
    """

    prompts: tuple[Tensor, ...]
    group: Tensor
    tokens: Tensor
    lengths: Tensor
    log_behavior: Tensor
    constraints: Constraints
    log_pf: Tensor | None = None
    log_pterm: Tensor | None = None
    terminated: Tensor | None = None
    is_action: Tensor | None = None
    has_grammar: bool = False

    @property
    def num_trajectories(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_tokens(self) -> int:
        """Drawn tokens, the terminations included."""
        return int(self.lengths.sum()) + self.num_trajectories

    def extended(self, other: "Rollouts") -> "Rollouts":
        """These trajectories followed by those of `other`, which has the same prompts and constraints.

        log_pf, log_pterm and terminated are dropped: not every trajectory need have them.
        """
        is_action = None
        if self.is_action is not None or other.is_action is not None:
            is_action = torch.cat([self.action_mask(), other.action_mask()])
        return Rollouts(
            self.prompts,
            torch.cat([self.group, other.group]),
            torch.cat([self.tokens, other.tokens]),
            torch.cat([self.lengths, other.lengths]),
            torch.cat([self.log_behavior, other.log_behavior]),
            self.constraints,
            is_action=is_action,
            has_grammar=self.has_grammar or other.has_grammar,
        )

    def action_mask(self) -> Tensor:
        """`is_action`, or every token if that is None."""
        if self.is_action is not None:
            return self.is_action
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def sequences(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A batch as one forest in depth-first order, one node per distinct (prefix, role).

    Node j is an ancestor of (or is) node i exactly when `j <= i and i < end[j]`. E.g. prompt [7] with samples
    [5, 6], [5], [5, 6]: tokens [7, 5, 6], end [3, 3, 3], parent [-1, 0, 1], count [3, 3, 2], leaf [2, 1, 2].

    tokens: (T,) int64.
    position: (T,) int64, depth of the node, which is its position id.
    end: (T,) int32, one past the last descendant.
    parent: (T,) int32, -1 at a root.
    count: (T,) int32, trajectories that pass through the node.
    group: (T,) int32, which prompt.
    role: (T,) int8, see Role.
    leaf: (N,) int64, the node at which each trajectory stops.
    length: (T,) int32, tokens of Z up to and including the node; 0 on prompt nodes.
    is_state: (T,) bool, the node is a prefix s_k of some Z that the policy continues or ends: the last prompt
        node (s_0), an action node, or the last observation of a tool's answer; not one that a tool answered.
    constraints: the sequence set the trajectories were drawn from.
    allowed: (U, ceil(V / 8)) uint8, distinct masks of tokens that q may choose, of token v bit v % 8 of byte
        v // 8; below min_length without the termination tokens. None without a grammar.
    allowed_row: (T,) int64, the mask of every state, -1 where there is none: off the states, at max_length.
    """

    tokens: Tensor
    position: Tensor
    end: Tensor
    parent: Tensor
    count: Tensor
    group: Tensor
    role: Tensor
    leaf: Tensor
    length: Tensor
    is_state: Tensor
    constraints: Constraints
    allowed: Tensor | None = None
    allowed_row: Tensor | None = None

    def to(self, device: torch.device | str) -> "TokenTree":
        fields = {f: getattr(self, f) for f in self.__slots__}
        return TokenTree(**{f: x.to(device) if isinstance(x, Tensor) else x for f, x in fields.items()})

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_groups(self) -> int:
        return int(self.group[-1]) + 1 if self.num_nodes else 0

    @property
    def terminable(self) -> Tensor:
        """(T,) bool: prefixes that may stop, hence carry a reward."""
        if self.constraints.termination == "own":
            return self.is_state
        if self.allowed is not None:
            return self.is_state & self._may_stop
        return self.is_state & (self.length >= self.constraints.min_length)

    @property
    def must_stop(self) -> Tensor:
        """(T,) bool: prefixes at which stopping is certain, by max_length or the grammar, whatever q is; none
        under "own" termination."""
        if self.constraints.termination == "own":
            return torch.zeros_like(self.is_state)
        at_limit = self.is_state & (self.length >= self.constraints.max_length)
        if self.allowed is None:
            return at_limit
        others = self.allowed.clone()
        for s in self.constraints.termination_token_ids:
            others[:, s // 8] &= 255 - (1 << s % 8)
        alone = ~others.bool().any(1)[self.allowed_row.clamp(min=0)] & (self.allowed_row >= 0)
        return at_limit | (self.is_state & alone)

    @property
    def _may_stop(self) -> Tensor:
        """(T,) bool: some termination token is allowed, or none is asked for."""
        stops = self.constraints.termination_token_ids
        may = torch.stack([self.allowed[:, s // 8] >> (s % 8) & 1 for s in stops]).bool().any(0)
        return may[self.allowed_row.clamp(min=0)] | (self.allowed_row < 0)

    @property
    def is_root_state(self) -> Tensor:
        """(T,) bool: s_0 of each group."""
        return self.is_state & (self.length == 0)


@dataclass(frozen=True, slots=True)
class TreePart:
    """Some trajectories of a tree, whole, as a tree of their own; see `split_tree`.

    tree: the nodes on their paths. `count` counts these trajectories alone; prompts keep their numbers.
    nodes: (T',) int64, ascending, which nodes of the whole tree these are.
    trajectories: (N',) int64, which of its trajectories, in the order of `tree.leaf`.
    """

    tree: TokenTree
    nodes: Tensor
    trajectories: Tensor


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Per-row log-probabilities, float32 (float64 for float64 input), natural log.

    From `linear_log_probs`, `policy_reward_log_probs`: log_pf (M,), log_pterm (R,) or None, lse (R,) or None.
    From `score`: node-aligned, log_pf (T,) = log q(node's token | its parent), 0 off the action nodes;
    log_pterm (T,) = log q(stop | node) at terminable nodes, 0 elsewhere; lse None; log_flow (T,) = log F of
    the policy's flow head at the states (no objective reads or trains it where stopping is certain, but at
    s_0), 0 elsewhere, None without a head.
    """

    log_pf: Tensor
    log_pterm: Tensor | None
    lse: Tensor | None = None
    log_flow: Tensor | None = None


def as_int64(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)
