"""The annealing path from a sampler to its target, and the Metropolis move along it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.evaluate.samples import Target
from fastgfn.rollout import SamplingOptions
from fastgfn.types import Rollouts

# Of the low 32 bits of a seed, all that torch's generator reads.
CHAINS = 0x5BD1E995


@dataclass(frozen=True, slots=True)
class States:
    """N sequences, ordered by prompt.

    lengths: (N,) int64. log_pf: (N, L) float64, log q of every token as the sampler saw it, 0 past lengths.
    log_ratio: (N,) float64, log R(x) / T - log q(x), with q in the sampler's precision.
    """

    sequences: list[list[int]]
    lengths: Tensor
    log_pf: Tensor
    log_ratio: Tensor


def num_cuts(lengths: Tensor, max_length: int) -> Tensor:
    """How many prefixes of a sequence something can be drawn after: of 0, 1, ... tokens, but not of
    max_length, where stopping is certain."""
    return lengths.clamp(max=max_length - 1) + 1


def log_acceptance(
    log_ratio: Tensor, proposed: Tensor, cuts: Tensor, proposed_cuts: Tensor, b: float
) -> Tensor:
    """Log of the Metropolis-Hastings acceptance probability of `regrow`'s proposal, elementwise.

    Args:
        log_ratio, proposed: log R / T - log q of the state x and of the proposal y.
        cuts, proposed_cuts: `num_cuts` of both.
        b: place on the path, in [0, 1].
    """
    change = b * (proposed - log_ratio) + cuts.double().log() - proposed_cuts.double().log()
    return change.clamp(max=0.0)


class Annealing:
    """Chains along pi_b ~ q^(1 - b) R^(b/T) for b = b_0 = 0, ..., b_K = 1; a step is one call of `sample`.

    schedule: K for b_k = k / K, or b_0..b_K. name: of the function that errors name.
    """

    def __init__(self, target: Target, schedule: int | Sequence[float], name: str) -> None:
        self.target = target
        self.name = name
        self.betas = _betas(name, schedule)
        have, fix = target.constraints.termination, "'own' takes stopping for possible everywhere"
        checks.check(have == "forced", name, "termination", "'forced'", repr(have), fix)

    @property
    def steps(self) -> int:
        return len(self.betas) - 1

    def forward(self, num_samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """(G, N) log w of chains that begin at draws of q, and the (G,) share of accepted moves."""
        chains = Chains(self.target, seed, num_samples)
        log_w, accepted = self._walk(chains, chains.draw(), self.betas)
        acceptance = torch.stack(accepted).double().mean(0) if accepted else None
        shape = (self.target.num_groups, num_samples)
        return log_w.view(shape), None if acceptance is None else acceptance.view(shape).mean(1)

    def reverse(self, draws: Rollouts, seed: int) -> Tensor:
        """(G, M) log w of chains that begin at exact draws of the target, M of every prompt."""
        target, name = self.target, self.name
        target.check_prompts(name, draws)
        counts = torch.bincount(draws.group, minlength=target.num_groups).tolist()
        ok, fix = len(set(counts)) == 1 and counts[0] > 0, "draw as many of each"
        checks.check(ok, name, "draws", "of equal number for every prompt", counts, fix)
        order = draws.group.argsort(stable=True)
        sequences = draws.sequences()
        chains = Chains(target, seed, counts[0], is_reverse=True)
        start = chains.states([sequences[i] for i in order.tolist()])
        log_w, _ = self._walk(chains, start, self.betas[::-1])
        return log_w.view(target.num_groups, counts[0])

    def _walk(self, chains: "Chains", states: States, betas: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Log w, and which moves were accepted."""
        log_w = torch.zeros_like(states.log_ratio)
        accepted = []
        for k, (b, following) in enumerate(pairwise(betas)):
            if k:
                states, is_accepted = chains.regrow(states, b)
                accepted.append(is_accepted)
            log_w += abs(following - b) * states.log_ratio
        return log_w, accepted


class Chains:
    """`num_samples` chains of every prompt; the noise is keyed by seed, by the direction and by the step."""

    def __init__(self, target: Target, seed: int, num_samples: int, *, is_reverse: bool = False) -> None:
        self.target = target
        self.seed = seed
        self.num_samples = num_samples
        self.total = target.num_groups * num_samples
        # far from the trajectories of the other direction
        self.first_trajectory = 2**61 if is_reverse else 0
        # apart from the stream that `draw_exact` has for the same seed or one near it
        self.generator = torch.Generator().manual_seed((seed * 2 + is_reverse) % 2**63 ^ CHAINS)

    def regrow(self, states: States, b: float) -> tuple[States, Tensor]:
        """One Metropolis move of every chain, in detailed balance with pi_b ~ q^(1 - b) R^(b/T).

        From x of n tokens: a cut c uniform on the m(x) = min(n, max_length - 1) + 1 prefixes of x that
        something can be drawn after; y keeps x_1..x_c and is drawn on by q. As a move with the cut c, which y
        has as well, it has the density (1 / m(x)) q(y) / q(x_1..x_c), and its reverse (1 / m(y)) q(x) /
        q(x_1..x_c). The density of the prefix cancels, and y is accepted with probability

            min(1, [pi_b(y) q(x) / m(y)] / [pi_b(x) q(y) / m(x)])
                = min(1, exp(b (log R(y)/T - log q(y) - log R(x)/T + log q(x))) m(x) / m(y)).

        Returns: the new states, and (N,) bool, which proposals were accepted.
        """
        longest = self.target.constraints.max_length
        cuts = num_cuts(states.lengths, longest)
        kept = (self._uniform() * cuts).long()
        prefixes = [z[:c] for z, c in zip(states.sequences, kept.tolist(), strict=True)]
        drawn = self._sample(prefixes)
        # a prefix cancels only if both sides count the same density for it
        is_kept = torch.arange(longest) < kept[:, None]
        proposed = self._weighed(drawn, torch.where(is_kept, states.log_pf, drawn.log_pf.double()))
        both = (states.log_ratio, proposed.log_ratio, cuts, num_cuts(proposed.lengths, longest))
        accepted = self._uniform().log() < log_acceptance(*both, b)
        pairs = zip(states.sequences, proposed.sequences, accepted.tolist(), strict=True)
        new = States(
            [y if is_new else x for x, y, is_new in pairs],
            torch.where(accepted, proposed.lengths, states.lengths),
            torch.where(accepted[:, None], proposed.log_pf, states.log_pf),
            torch.where(accepted, proposed.log_ratio, states.log_ratio),
        )
        return new, accepted

    def draw(self) -> States:
        """Draws of q."""
        drawn = self._sample([[]] * self.total)
        return self._weighed(drawn, drawn.log_pf.double())

    def states(self, sequences: list[list[int]]) -> States:
        """Given sequences, with the density that the sampler would have drawn them with."""
        drawn = self._sample(sequences)
        lengths = torch.tensor([len(z) for z in sequences])
        # what was drawn after them is dropped: it only shows the probability of stopping there
        return self._weighed(replace(drawn, lengths=lengths, is_action=None), drawn.log_pf.double())

    def _uniform(self) -> Tensor:
        return torch.rand(self.total, generator=self.generator, dtype=torch.float64)

    def _sample(self, prefixes: list[list[int]]) -> Rollouts:
        first, self.first_trajectory = self.first_trajectory, self.first_trajectory + self.total
        options = SamplingOptions(prefixes=prefixes)
        return self.target.draw(self.num_samples, seed=self.seed, first_trajectory=first, options=options)

    def _weighed(self, drawn: Rollouts, log_pf: Tensor) -> States:
        lengths = drawn.lengths
        log_pf = log_pf.masked_fill(torch.arange(log_pf.shape[1]) >= lengths[:, None], 0.0)
        log_stop = drawn.log_pterm.double().gather(1, lengths[:, None])[:, 0]
        log_r = self.target.log_rewards(drawn) / self.target.reward_temperature
        return States(drawn.sequences(), lengths, log_pf, log_r - log_pf.sum(1) - log_stop)


def _betas(name: str, schedule: int | Sequence[float]) -> list[float]:
    if isinstance(schedule, int):
        checks.check(schedule >= 1, name, "schedule", ">= 1 steps", schedule, "1 is importance sampling")
        return [k / schedule for k in range(schedule + 1)]
    betas = [float(b) for b in schedule]
    ok = len(betas) > 1 and betas[0] == 0 and betas[-1] == 1 and all(a < b for a, b in pairwise(betas))
    checks.check(ok, name, "schedule", "a rise from 0 to 1, or a number of steps", betas[:20], "pass e.g. 16")
    return betas
