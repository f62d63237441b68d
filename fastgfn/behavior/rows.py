"""Rollouts as rows: joined, chosen, made of given sequences, and their log q and rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgfn.models import Policy
from fastgfn.ops.tree import path_nodes
from fastgfn.packing import pack, split_tree
from fastgfn.passes import score_and_reward, trajectory_log_q
from fastgfn.rewards import Reward, log_factors, log_reward
from fastgfn.types import Constraints, Grammar, Rollouts, TokenTree, as_int64

PER_ROW = ("group", "tokens", "lengths", "log_behavior", "log_pf", "log_pterm", "terminated", "is_action")


def joined(first: Rollouts, second: Rollouts) -> Rollouts:
    """The rows of two draws for the same prompts, the sampler's log-probs kept."""
    return replace(first, **{f: torch.cat([getattr(first, f), getattr(second, f)]) for f in PER_ROW})


def chosen(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """Some rows; `rows` are places or a mask."""
    values = {f: getattr(rollouts, f) for f in PER_ROW}
    return replace(rollouts, **{f: None if v is None else v[rows] for f, v in values.items()})


def of_sequences(
    prompts: Sequence[Sequence[int]],
    group: Sequence[int],
    sequences: Sequence[Sequence[int]],
    constraints: Constraints,
    *,
    has_grammar: bool = False,
) -> Rollouts:
    """Given sequences; how likely they were is not known."""
    tokens = torch.zeros(len(sequences), constraints.max_length, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = as_int64(sequence)
    return Rollouts(
        tuple(map(as_int64, prompts)),
        as_int64(group),
        tokens,
        as_int64([len(z) for z in sequences]),
        torch.full((len(sequences),), torch.nan),
        constraints,
        has_grammar=has_grammar,
    )


@dataclass(frozen=True, slots=True)
class Judge:
    """What every trajectory is worth: a tree, in parts of max_tokens, without gradient.

    policy, reward, grammar, max_tokens: of the run.
    needs_log_q: whether log q is computed, too.
    """

    policy: Policy
    reward: Reward
    grammar: Grammar | None
    max_tokens: int | None
    needs_log_q: bool = False

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """(N,) float64 un-tempered log R, and log q or, where that is not needed, zeros; on the CPU."""
        tree = pack(rollouts, grammar=self.grammar, device=self.policy.device)
        log_r = torch.zeros(rollouts.num_trajectories, dtype=torch.float64)
        log_q = torch.zeros_like(log_r)
        for part in split_tree(tree, max_tokens=self.max_tokens):
            rows = part.trajectories.cpu()
            if self.needs_log_q:
                log_probs, value = score_and_reward(part.tree, policy=self.policy, reward=self.reward)
                log_q[rows] = trajectory_log_q(log_probs, part.tree).cpu()
            else:
                value = log_reward(part.tree, reward=self.reward)
            log_r[rows] = value[part.tree.leaf].double().cpu()
        return log_r, log_q

    @torch.no_grad()
    def factors(self, rollouts: Rollouts) -> Tensor:
        """(N, K) float64 un-tempered factors of R, see `log_factors`; on the CPU."""
        tree = pack(rollouts, grammar=self.grammar, device=self.policy.device)
        parts = split_tree(tree, max_tokens=self.max_tokens)
        values = []
        for part in parts:
            value = log_reward(part.tree, reward=self.reward)
            values.append(log_factors(part.tree, value, reward=self.reward)[part.tree.leaf])
        rows = torch.cat([part.trajectories for part in parts]).argsort()
        return torch.cat(values)[rows].double().cpu()


def drift(rollouts: Rollouts, tree: TokenTree, log_pf: Tensor) -> float:
    """Mean |log q of the sampler - log q of the score| over the actions of the rollouts, the tree's first
    trajectories; below min_length under "own" the two are not the same density and left out."""
    num, limits = rollouts.num_trajectories, rollouts.constraints
    nodes = path_nodes(tree.parent.cpu(), tree.leaf[:num].cpu(), rollouts.lengths, limits.max_length)
    counted = rollouts.action_mask().clone()
    if limits.termination == "own":
        counted[:, : limits.min_length] = False
    if not num:
        return 0.0
    gap = log_pf.cpu()[nodes.clamp(min=0)] - rollouts.log_pf
    return float(gap[counted].abs().mean()) if bool(counted.any()) else 0.0
