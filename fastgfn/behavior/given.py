"""Sequences that are given before training: demonstrations, and what label-revealing prompts yield."""

import operator
from collections.abc import Sequence

import torch

from fastgfn import checks
from fastgfn.config import Behavior
from fastgfn.models import Policy
from fastgfn.rollout import check_prompts
from fastgfn.rollout.draws import LEAST_BIAS
from fastgfn.types import Constraints, Grammar, as_int64


def check_sequence(
    what: str, z: Sequence[int], constraints: Constraints, vocab: int, grammar: Grammar | None
) -> None:
    """Refuse a sequence outside the set that the policy is defined on."""
    stops, bias = constraints.termination_token_ids, constraints.logit_bias
    fix = "shorten or drop it, or change the constraints"

    def need(ok: bool, want: str) -> None:
        checks.check(ok, "Trainer", what, want, list(z), fix)

    need(all(0 <= t < vocab for t in z), f"of ids in [0, {vocab})")
    need(not set(z) & set(stops), f"without the termination tokens {list(stops)}")
    low, high = constraints.min_length, constraints.max_length
    need(low <= len(z) <= high, f"of {low} to {high} tokens")
    if bias is not None:
        masked = [t for t in z if float(bias[t]) <= LEAST_BIAS]
        need(not masked, f"without the masked tokens {masked}")
    if grammar is None:
        return
    # at max_length a sequence ends whatever the grammar says
    states = [list(z[:k]) for k in range(min(len(z) + 1, high))]
    allowed = grammar.allowed(states)
    checks.check_shape("Trainer", "grammar mask", allowed, (len(states), vocab), "return a column per token")
    need(all(bool(allowed[k, t]) for k, t in enumerate(z)), "one that the grammar allows")
    if len(z) < high:
        need(bool(allowed[len(z), list(stops)].any()), "one that the grammar lets end there")


def check_demonstrations(
    demonstrations: Sequence[tuple[int, Sequence[int]]],
    *,
    num_prompts: int,
    constraints: Constraints,
    vocab: int,
    grammar: Grammar | None,
    config: Behavior,
) -> list[list[list[int]]]:
    """The demonstrations of each prompt.

    Raises:
        InputError: a prompt that does not exist, a sequence outside the constraints or the grammar, settings
            that use none of them or ask for some where there are none.
    """
    joins = max(config.demonstration_samples) > 0
    have, fix = config.demonstration_samples, "pass demonstrations=[(prompt index, token ids), ...]"
    ok = len(demonstrations) > 0 or not joins
    checks.check(ok, "Trainer", "demonstration_samples", "(0, 0) without demonstrations", have, fix)
    ok = len(demonstrations) == 0 or joins or config.uses_buffer
    fix = "set demonstration_samples, replay_samples or replay_share"
    checks.check(ok, "Trainer", "demonstrations", "none where nothing uses them", len(demonstrations), fix)
    found: list[list[list[int]]] = [[] for _ in range(num_prompts)]
    for i, (prompt, z) in enumerate(demonstrations):
        known = type(prompt) is int and 0 <= prompt < num_prompts
        want, fix = f"an index in [0, {num_prompts})", "count the prompts from 0"
        checks.check(known, "Trainer", f"the prompt of demonstrations[{i}]", want, repr(prompt), fix)
        z = _token_ids(f"demonstrations[{i}]", z)
        check_sequence(f"demonstrations[{i}]", z, constraints, vocab, grammar)
        if z not in found[prompt]:
            found[prompt].append(z)
    return found


def _token_ids(what: str, z) -> list[int]:
    try:
        return [operator.index(t) for t in (z.tolist() if hasattr(z, "tolist") else z)]
    except TypeError:
        fix = "encode the text"
        checks.fail("Trainer", what, "token ids", repr(z)[:80], fix, kind=checks.InputTypeError)


def check_seed_prompts(
    seed_prompts: Sequence[Sequence[int] | None] | None,
    *,
    num_prompts: int,
    policy: Policy,
    constraints: Constraints,
    config: Behavior,
) -> list[list[int] | None]:
    """One per prompt, or nothing.

    Raises:
        InputError: another number than of prompts, one that does not fit the model, no buffer to fill.
    """
    if seed_prompts is None:
        return []
    fix = "give one per prompt, None for none"
    checks.check(
        len(seed_prompts) == num_prompts, "Trainer", "seed_prompts", num_prompts, len(seed_prompts), fix
    )
    fix = "set replay_samples or replay_share"
    checks.check(config.uses_buffer, "Trainer", "seed_prompts", "None without replay", "some", fix)
    num = config.seed_prompt_samples
    checks.check(num >= 1, "Trainer", "seed_prompt_samples", ">= 1 with seed_prompts", num, "raise it")
    given = [None if p is None else as_int64(p) for p in seed_prompts]
    check_prompts([p for p in given if p is not None], policy, constraints)
    return [None if p is None else p.tolist() for p in given]


def cut_constraints(constraints: Constraints, other: Constraints | None) -> Constraints:
    """What seed sequences are drawn under: `other`, which must not leave the set of `constraints`."""
    if other is None:
        return constraints
    low, high = constraints.min_length, constraints.max_length
    have = f"{other.min_length} to {other.max_length} tokens"
    ok = low <= other.min_length and other.max_length <= high
    fix = "draw no sequence that the run's constraints rule out"
    checks.check(ok, "Trainer", "seed_constraints", f"of {low} to {high} tokens", have, fix)
    ok = set(constraints.termination_token_ids) <= set(other.termination_token_ids)
    want = f"with the termination tokens {list(constraints.termination_token_ids)}"
    checks.check(ok, "Trainer", "seed_constraints", want, list(other.termination_token_ids), fix)
    bias, mine = constraints.logit_bias, other.logit_bias
    if bias is not None:
        masked = torch.as_tensor(bias) <= LEAST_BIAS
        ok = mine is not None and bool((mine[masked] <= LEAST_BIAS).all())
        checks.check(ok, "Trainer", "seed_constraints", "with a mask no wider than the run's", "another", fix)
    return other
