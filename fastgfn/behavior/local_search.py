"""Local search: destroy a random suffix, grow it again, keep what the rule accepts.

Kim et al. 2023 (arXiv:2310.02710), with one cut per trajectory, uniform over its places.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgfn.behavior.rows import chosen
from fastgfn.evaluate import annealing
from fastgfn.evaluate.annealing import num_cuts
from fastgfn.types import Rollouts


@dataclass(frozen=True, slots=True)
class Points:
    """Where searches are: N trajectories, their un-tempered log R and their log q, (N,) float64 each."""

    rollouts: Rollouts
    log_reward: Tensor
    log_q: Tensor

    def moved(self, others: "Points", where: Tensor) -> "Points":
        """`others` in the rows of the mask, these elsewhere; row n of both is of the same search."""
        num = self.rollouts.num_trajectories
        rows = torch.arange(num) + num * where
        return Points(
            chosen(self.rollouts.extended(others.rollouts), rows),
            torch.where(where, others.log_reward, self.log_reward),
            torch.where(where, others.log_q, self.log_q),
        )


def log_acceptance(old: Points, new: Points, *, accept: str, reward_temperature: float) -> Tensor:
    """(N,) log-probability with which each search moves from `old` to `new`, its regrown trajectory.

    accept: "always"; "better": R does not fall; "metropolis": with n(x) the places where x can be cut,
        min(1, R(x')^(1/T) q(x) n(x) / (R(x)^(1/T) q(x') n(x'))),
        which leaves R^(1/T) invariant, as x' is proposed with probability q(x') / q(s_k) / n(x) for every
        prefix s_k that both have. It needs log_q.
    """
    if accept == "always":
        return torch.zeros_like(new.log_reward)
    gain = new.log_reward - old.log_reward
    if accept == "better":
        return torch.where(gain >= 0, 0.0, -torch.inf)
    longest = old.rollouts.constraints.max_length
    cuts = [num_cuts(points.rollouts.lengths, longest) for points in (old, new)]
    ratios = [points.log_reward / reward_temperature - points.log_q for points in (old, new)]
    return annealing.log_acceptance(*ratios, *cuts, 1.0)


def search(
    start: Points,
    *,
    grow: Callable[[Rollouts, list[list[int]]], Rollouts],
    judge: Callable[[Rollouts], tuple[Tensor, Tensor]] | None,
    rounds: int,
    accept: str,
    reward_temperature: float,
    rng: np.random.Generator,
) -> list[Rollouts]:
    """What was accepted, by round.

    Args:
        start: where each search begins.
        grow: (trajectories, prefixes) -> row by row a trajectory of the same prompt that begins so.
        judge: rollouts -> log R and log q; None where `accept` needs neither.
    """
    points, found = start, []
    for _ in range(rounds):
        lengths, longest = points.rollouts.lengths, points.rollouts.constraints.max_length
        cuts = rng.integers(0, num_cuts(lengths, longest).numpy())
        sequences = points.rollouts.sequences()
        grown = grow(points.rollouts, [z[:k] for z, k in zip(sequences, cuts.tolist(), strict=True)])
        values = (points.log_reward, points.log_q) if judge is None else judge(grown)
        regrown = Points(grown, *values)
        log_p = log_acceptance(points, regrown, accept=accept, reward_temperature=reward_temperature)
        moves = torch.from_numpy(np.log(rng.random(len(cuts)))) < log_p
        points = points.moved(regrown, moves)
        found.append(chosen(grown, moves))
    return found


def best_rows(rollouts: Rollouts, log_reward: Tensor, num: int) -> Tensor:
    """(K,) places of each prompt's best `num` distinct sequences, by log R, the first of equal ones."""
    seen, taken, rows = set(), {}, []
    sequences, groups = rollouts.sequences(), rollouts.group.tolist()
    for row in (-log_reward).argsort(stable=True).tolist():
        key, group = (groups[row], tuple(sequences[row])), groups[row]
        if key not in seen and taken.get(group, 0) < num:
            seen.add(key)
            taken[group] = taken.get(group, 0) + 1
            rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def random_rows(rollouts: Rollouts, num: int, rng: np.random.Generator) -> Tensor:
    """(K,) places of `num` of each prompt's trajectories, drawn without replacement."""
    rows = []
    for group in range(len(rollouts.prompts)):
        own = (rollouts.group == group).nonzero()[:, 0].numpy()
        rows.append(np.sort(rng.permutation(own)[:num]))
    return torch.from_numpy(np.concatenate(rows))
