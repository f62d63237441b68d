"""Stage 3, beside `score`: TokenTree -> log R of every prefix that may stop.

A reward is a callable(TokenTree) -> (T,) tensor holding the un-tempered log R(s stop) at terminable nodes;
other entries are ignored. A reward that is only known at the end of a trajectory sets `terminal_only = True`;
then all but the nodes where a trajectory stops are ignored.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional.parts import split_tree
from fastgfn.functional.suffixes import hang_suffixes
from fastgfn.functional.tree import node_sequences
from fastgfn.models import Reference
from fastgfn.ops.scan import tree_cumsum
from fastgfn.phases import phase
from fastgfn.types import LogProbs, Role, TokenTree

Reward = Callable[[TokenTree], Tensor]
# Trees whose factors a product of rewards keeps: the parts of one step.
RECENT = 64
# What may follow Z: token ids Y, or several candidates.
Suffix = Sequence[int] | Sequence[Sequence[int]]


class LMReward:
    """log p(X Z stop) - log p(X) of the base model, for all prefixes in one forward of the tree; with
    `suffixes` log p(X Z Y) - log p(X), where Y follows Z and nothing stops (Hu et al. 2024, arXiv:2310.04363,
    infilling): the tree then has a copy of Y below every prefix that may stop.

    It knows no grammar. What q learns under one is this p restricted to what q can draw, the grammar's
    sequences and those that max_length cuts, and renormalised: p conditioned on the grammar.

    Args:
        reference: `policy.reference`.
        logit_bias: (V,) added to the base model's logits before its softmax, or None.
        short_penalty: log R of prefixes below min_length under "own" termination (the published -99); under
            "forced" such prefixes are not terminable and it is not used.
        suffixes: Y for all prompts, or by prompt {tuple of token ids: Y}. Y is a list of token ids, or a list
            of such lists, any of which may follow: log R is the log of the sum of their p(Z Y | X).
        max_tokens: a tree that is larger with its suffixes is forwarded in parts.

    Raises:
        InputError: an empty Y or none, a token outside the vocabulary, a prompt without Y.
    """

    terminal_only = False

    def __init__(
        self,
        reference: Reference,
        *,
        logit_bias: Tensor | None = None,
        short_penalty: float = -99.0,
        suffixes: Suffix | Mapping[tuple[int, ...], Suffix] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.reference = reference
        self.logit_bias = logit_bias
        self.short_penalty = short_penalty
        self.max_tokens = max_tokens
        self.suffixes = suffixes
        if suffixes is not None:
            self.suffixes = _checked_suffixes(suffixes, reference.head.weight.shape[0])

    def __call__(self, tree: TokenTree) -> Tensor:
        if self.suffixes is not None:
            return self._with_suffixes(tree)
        return self.from_log_probs(self.reference.tree_log_probs(tree, self.logit_bias), tree)

    @torch.no_grad()
    def from_log_probs(self, raw: LogProbs, tree: TokenTree) -> Tensor:
        """(T,) float64 log R from the reference's node-aligned log p under `logit_bias`: a loss reads small
        differences of these large sums, which float32 would round to 1e-6 nats at log R = -15."""
        return self._penalised(tree_cumsum(raw.log_pf.double(), tree.parent) + raw.log_pterm, tree)

    @torch.no_grad()
    def _with_suffixes(self, tree: TokenTree) -> Tensor:
        large, above = hang_suffixes(tree, [self._suffixes_of(prompt) for prompt in _prompts(tree)])
        sums = torch.empty(len(above), dtype=torch.float64, device=above.device)
        for part in split_tree(large, max_tokens=self.max_tokens):
            raw = self.reference.tree_log_probs(part.tree, self.logit_bias)
            paths = tree_cumsum(raw.log_pf.double(), part.tree.parent)
            sums[part.trajectories] = paths[part.tree.leaf]
        # the log of the sum over the candidates of each prefix
        top = sums.new_full((tree.num_nodes,), -torch.inf).scatter_reduce(0, above, sums, "amax")
        total = torch.zeros_like(top).index_add(0, above, (sums - top[above]).exp())
        value = torch.where(tree.terminable, top + total.log(), 0.0)
        return self._penalised(value, tree)

    def _suffixes_of(self, prompt: tuple[int, ...]) -> list[list[int]]:
        if not prompt:
            return []  # of a group that the part of a tree does not hold
        found = self.suffixes.get(prompt, self.suffixes.get(None))
        have = f"none for {list(prompt[-20:])}"
        checks.check(found is not None, "LMReward", "suffixes", "given for every prompt", have, "add it")
        return found

    def _penalised(self, value: Tensor, tree: TokenTree) -> Tensor:
        short = tree.is_state & (tree.length < tree.constraints.min_length)
        return value.masked_fill(short, self.short_penalty)


def _checked_suffixes(
    suffixes: Suffix | Mapping[tuple[int, ...], Suffix], vocab_size: int
) -> dict[tuple[int, ...] | None, list[list[int]]]:
    """By prompt, None being every other one, the candidates."""
    given = suffixes.items() if isinstance(suffixes, Mapping) else [(None, suffixes)]
    table = {}
    for prompt, suffix in given:
        suffix = suffix.tolist() if isinstance(suffix, Tensor) else list(suffix)
        nested = bool(suffix) and all(isinstance(y, (list, tuple)) for y in suffix)
        several = [list(y) for y in suffix] if nested else [suffix]
        ids = all(type(t) is int and 0 <= t < vocab_size for y in several for t in y)
        want = f"non-empty lists of token ids in [0, {vocab_size})"
        checks.check(ids and all(several), "LMReward", "suffixes", want, several, "encode the text of Y")
        table[None if prompt is None else tuple(prompt)] = several
    return table


def _prompts(tree: TokenTree) -> list[tuple[int, ...]]:
    is_prompt = (tree.role == Role.PROMPT).cpu()
    tokens, group = tree.tokens.cpu()[is_prompt], tree.group.cpu()[is_prompt]
    return [tuple(tokens[group == g].tolist()) for g in range(tree.num_groups)]


class SequenceReward:
    """A reward from a plain function of token ids: `function(list of Z) -> one log R per Z`.

    Every distinct terminable prefix is passed exactly once; Z excludes prompt and termination token. With
    terminal_only=True the reward is only meaningful at the end of a trajectory: other prefixes are left out.
    """

    def __init__(
        self, function: Callable[[list[list[int]]], Sequence[float] | Tensor], *, terminal_only: bool = False
    ) -> None:
        self.function = function
        self.terminal_only = terminal_only

    def __call__(self, tree: TokenTree) -> Tensor:
        nodes = _rewarded(self, tree).nonzero()[:, 0]
        result = self.function(node_sequences(tree, nodes))
        try:
            value = torch.as_tensor(result, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            have, fix = type(result).__name__, "return one log-reward per sequence"
            checks.fail(
                "SequenceReward",
                "the function's result",
                "a list of numbers",
                have,
                fix,
                kind=checks.InputTypeError,
            )
        checks.check_shape(
            "SequenceReward",
            "the function's result",
            value,
            (len(nodes),),
            "return one log-reward per sequence",
        )
        return torch.zeros(tree.num_nodes, dtype=value.dtype, device=nodes.device).index_copy(
            0, nodes, value.to(nodes.device)
        )


def _rewarded(reward: Reward, tree: TokenTree) -> Tensor:
    """(T,) bool: the nodes whose log R is defined, of those that may stop."""
    if not getattr(reward, "terminal_only", False):
        return tree.terminable
    return tree.terminable & torch.zeros_like(tree.is_state).index_fill(0, tree.leaf, True)


@phase("reward")
def log_reward(tree: TokenTree, *, reward: Reward, name: str = "log R") -> Tensor:
    """(T,) un-tempered log R at terminable nodes, 0 elsewhere: float32 (float64 if the reward is), detached.
    Of a terminal-only reward 0 also where no trajectory stops. name: of the value, in an error.

    Raises:
        InputError: the reward returned a wrong shape or (NonFiniteError) a non-finite value; the sequence is
            named.
        InputTypeError: it returned something that is not a floating-point tensor.
    """
    value = reward(tree)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        have = value.dtype if isinstance(value, Tensor) else type(value).__name__
        checks.fail(
            "log_reward",
            "the reward's result",
            "a floating-point tensor",
            have,
            "return log R per node, or wrap a function of token ids in SequenceReward",
            kind=checks.InputTypeError,
        )
    checks.check_shape(
        "log_reward", "the reward's result", value, (tree.num_nodes,), "return one value per tree node"
    )
    value = value.detach().to(tree.tokens.device)
    value = (value if value.dtype == torch.float64 else value.float()).masked_fill(
        ~_rewarded(reward, tree), 0.0
    )
    bad = ~value.isfinite()
    if bool(bad.any()):
        node = bad.nonzero()[0]
        have = f"{float(value[node])} for Z = {node_sequences(tree, node)[0]}"
        fix = "clamp the reward from below (e.g. -99) and check its inputs"
        text = checks.message("log_reward", name, "finite", have, fix)
        raise checks.NonFiniteError(text, tree=tree, log_reward=value)
    return value


class ProductReward:
    """R(Z) = prod_k f_k(Z)^(1/T_k): log R = sum_k log f_k / T_k, each factor with a temperature of its own.

    `Trainer` stores the un-tempered factors of what it replays and calls `at(step)`, so a schedule applies to
    replayed sequences as to drawn ones. Its reward_temperature divides the sum once more.

    Args:
        factors: a reward by name; the order is that of the columns.
        temperatures: by name a number > 0, or (start, end, horizon): the value at step 0 and from step
            `horizon` on, linear between; a factor that is not named has 1.

    A call takes the last value of every schedule, what training aims at; `at(step)` that of a step.
    terminal_only is set if it is of any factor.

    Raises:
        InputError: no factor, a temperature of an unknown one, or one out of range.
    """

    def __init__(
        self,
        factors: Mapping[str, Reward],
        *,
        temperatures: Mapping[str, float | tuple[float, float, int]] | None = None,
    ) -> None:
        given = dict(temperatures or {})
        checks.check(bool(factors), "ProductReward", "factors", "at least one reward", 0, "name a reward")
        unknown = sorted(given.keys() - factors.keys())
        fix = f"use some of {list(factors)}"
        checks.check(not unknown, "ProductReward", "temperatures", "of known factors", unknown, fix)
        self.names = tuple(factors)
        self.rewards = tuple(factors.values())
        self.terminal_only = any(getattr(r, "terminal_only", False) for r in self.rewards)
        self.schedules = tuple(_schedule(name, given.get(name, 1.0)) for name in self.names)
        self.temperatures = tuple(end for _, end, _ in self.schedules)
        self._known: deque[tuple[TokenTree, Tensor]] = deque(maxlen=RECENT)

    def at(self, step: int) -> "ProductReward":
        """The product under the temperatures of optimiser step `step` (0-based)."""
        values = {
            name: start + (end - start) * min(1.0, step / horizon)
            for name, (start, end, horizon) in zip(self.names, self.schedules, strict=True)
        }
        return ProductReward(dict(zip(self.names, self.rewards, strict=True)), temperatures=values)

    def __call__(self, tree: TokenTree) -> Tensor:
        return self.tempered(self.factors(tree))

    def factors(self, tree: TokenTree) -> Tensor:
        """(T, K) float64 un-tempered log f_k at terminable nodes; those of the last trees are kept, so that
        asking for log R and for its factors computes them once.

        Raises:
            InputError: as `log_reward`, with the factor's name.
        """
        for known, factors in self._known:
            if known is tree:
                return factors
        columns = [
            log_reward(tree, reward=reward, name=f"log R ({name!r})").double()
            for name, reward in zip(self.names, self.rewards, strict=True)
        ]
        self._known.append((tree, torch.stack(columns, dim=1)))
        return self._known[-1][1]

    def tempered(self, factors: Tensor) -> Tensor:
        """(..., K) factors -> (...,) log R under `temperatures`."""
        return (factors / factors.new_tensor(self.temperatures)).sum(-1)


def _schedule(name: str, value: float | tuple[float, float, int]) -> tuple[float, float, int]:
    try:
        start, end, horizon = (value, value, 1) if isinstance(value, int | float) else value
        ok = all(math.isfinite(t) and t > 0 for t in (start, end)) and horizon >= 1
    except (TypeError, ValueError):
        ok = False
    want, fix = "a number > 0 or (start > 0, end > 0, horizon >= 1)", "change it"
    checks.check(ok, "ProductReward", f"the temperature of {name!r}", want, repr(value), fix)
    return float(start), float(end), horizon


def log_factors(tree: TokenTree, value: Tensor, *, reward: Reward) -> Tensor:
    """(T, K) un-tempered factors of a reward whose `log_reward` of the tree is `value`: of a product its own,
    of any other reward that one column."""
    return reward.factors(tree) if isinstance(reward, ProductReward) else value[:, None]
