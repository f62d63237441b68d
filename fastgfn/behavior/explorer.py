"""What a micro-batch is made of: fresh draws, local search, replay, demonstrations."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.behavior import local_search as search
from fastgfn.behavior.given import (
    check_demonstrations,
    check_seed_prompts,
    check_sequence,
    cut_constraints,
)
from fastgfn.behavior.rows import Judge, chosen, joined, of_sequences
from fastgfn.behavior.sampler import Sampler
from fastgfn.config import TrainConfig
from fastgfn.models import Policy
from fastgfn.replay import ReplayBuffer
from fastgfn.replay.neighbors import Embed
from fastgfn.rewards import ProductReward, Reward
from fastgfn.rollout import SamplingOptions
from fastgfn.types import Constraints, Grammar, Rollouts

# Random choices that have a generator each; stream 3 is the target temperature of a step.
_TEMPERATURES, _REPLAY, _PROMPTS, _TARGETS, _SEARCH, _DEMONSTRATIONS = range(6)


class Origin(IntEnum):
    """Where a trajectory of a batch comes from."""

    DRAWN = 0
    LOCAL_SEARCH = 1
    REPLAYED = 2
    DEMONSTRATION = 3


@dataclass(frozen=True, slots=True)
class Drawn:
    """A micro-batch.

    rollouts: all of its trajectories, N, those of `fresh` first.
    origin: (N,) int64, see Origin.
    fresh: the ones drawn from the policy for it, with the sampler's log-probs.
    num_trajectories, num_tokens: drawn on the way, rejected ones and the terminations included.
    """

    rollouts: Rollouts
    origin: Tensor
    fresh: Rollouts
    num_trajectories: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Now:
    """The micro-batch that is drawn, and the reward of its step."""

    step: int
    micro: int
    sampler: Sampler
    reward: Reward
    reward_temperature: float


class Explorer:
    """The behaviour policy of a run, see `fastgfn.config.Behavior`.

    Args: as `Trainer`, which has checked prompts and constraints. factors: names of the reward's.

    Raises:
        InputError: demonstrations or seed prompts that do not fit the run or its settings.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompts: Sequence[Sequence[int]],
        constraints: Constraints,
        config: TrainConfig,
        grammar: Grammar | None = None,
        demonstrations: Sequence[tuple[int, Sequence[int]]] = (),
        seed_prompts: Sequence[Sequence[int] | None] | None = None,
        seed_constraints: Constraints | None = None,
        factors: Sequence[str] = ("log_reward",),
        embed: Embed | None = None,
    ) -> None:
        self.policy = policy
        self.constraints = constraints
        self.config = config
        self.grammar = grammar
        self._prompts = [list(p) for p in prompts]
        num, vocab = len(self._prompts), policy.vocab_size
        self._demonstrations = check_demonstrations(
            demonstrations,
            num_prompts=num,
            constraints=constraints,
            vocab=vocab,
            grammar=grammar,
            config=config,
        )
        self._seed_constraints = cut_constraints(constraints, seed_constraints)
        self._seed_prompts = check_seed_prompts(
            seed_prompts, num_prompts=num, policy=policy, constraints=self._seed_constraints, config=config
        )
        self.buffer = ReplayBuffer(
            config.replay_capacity,
            duplicates=config.replay_duplicates if config.uses_buffer else "exact",
            tolerance=config.replay_tolerance,
            priority=config.replay_priority,
            half_life=config.replay_half_life,
            recency_share=config.replay_recency_share,
            selection=config.replay_selection,
            keep=config.replay_keep,
            max_age=config.replay_max_age,
            factors=factors,
            embed=embed,
        )

    def draw(
        self,
        step: int,
        micro: int,
        *,
        reward: Reward,
        reward_temperature: float = 1.0,
        first_trajectory: int = 0,
        merge: bool = True,
    ) -> Drawn:
        """The trajectories of micro-batch `micro` of optimiser step `step`.

        reward, reward_temperature: of this step; local search reads them.
        first_trajectory, merge: as of `sample`; the draws of the run are numbered through.

        Raises:
            InputError: as `sample`; a prompt without any trajectory, as nothing is drawn or in the buffer.
        """
        self._retemper(reward)
        now = _Now(step, micro, self._sampler(first_trajectory, merge), reward, reward_temperature)
        indices = self.indices(step, micro)
        fresh = self._fresh([self._prompts[i] for i in indices], now)
        parts = [(Origin.DRAWN, fresh)]
        parts += [(Origin.LOCAL_SEARCH, part) for part in self._searched(fresh, now)]
        parts += [(Origin.REPLAYED, part) for part in self._replayed(fresh, now)]
        parts += [(Origin.DEMONSTRATION, part) for part in self._shown(indices, now)]
        rollouts, origin = _together(parts)
        self._check_some(rollouts)
        return Drawn(rollouts, origin, fresh, now.sampler.num_trajectories, now.sampler.num_tokens)

    def remember(self, drawn: Drawn, log_factors: Tensor, step: int) -> None:
        """Store what is new in the batch of optimiser step `step` with the (N, K) un-tempered factors of R of
        all of its trajectories."""
        if self.config.uses_buffer:
            new = drawn.origin <= Origin.LOCAL_SEARCH
            self.buffer.add(chosen(drawn.rollouts, new), log_factors.cpu()[new], version=step)

    def fill(self, *, reward: Reward, first_trajectory: int = 0, merge: bool = True) -> tuple[int, int]:
        """Store the demonstrations and what the seed prompts yield, with the reward that each has under its
        own prompt; returns how many sequences and tokens were drawn. Before step 0.

        Raises:
            InputError: as `sample` and `log_reward`; a drawn sequence that the grammar rules out.
        """
        self._retemper(reward)
        sampler = self._sampler(first_trajectory, merge)
        if not self.config.uses_buffer:
            return 0, 0
        found = [[list(z) for z in given] for given in self._demonstrations]
        seeded = [i for i, prompt in enumerate(self._seed_prompts) if prompt is not None]
        if seeded:
            drawn = sampler(
                [self._seed_prompts[i] for i in seeded],
                self.config.seed_prompt_samples,
                self._seed_constraints,
                temperature=self.config.seed_prompt_temperature,
            )
            for g, z in zip(drawn.group.tolist(), drawn.sequences(), strict=True):
                if z not in found[seeded[g]]:
                    what = f"a sequence of seed_prompts[{seeded[g]}]"
                    check_sequence(what, z, self.constraints, self.policy.vocab_size, self.grammar)
                    found[seeded[g]].append(z)
        judge = self._judge(reward)
        for prompt, sequences in zip(self._prompts, found, strict=True):
            if sequences:
                given = self._of_sequences([prompt], [0] * len(sequences), sequences)
                self.buffer.add(given, judge.factors(given))
        return sampler.num_trajectories, sampler.num_tokens

    def prompts(self, step: int, micro: int) -> list[list[int]]:
        """The next prompts of a stream that visits every prompt once per epoch, in a new order each time."""
        return [self._prompts[i] for i in self.indices(step, micro)]

    def indices(self, step: int, micro: int) -> list[int]:
        """Their places among the prompts of the run."""
        first = (step * self.config.accumulation + micro) * self.config.prompts_per_step
        num, found = len(self._prompts), []
        for index in range(first, first + self.config.prompts_per_step):
            epoch, place = divmod(index, num)
            found.append(int(self._rng(_PROMPTS, epoch).permutation(num)[place]))
        return found

    @property
    def given_hash(self) -> str | None:
        """Of the demonstrations and seed prompts; None without any."""
        if not any(self._demonstrations) and not self._seed_prompts:
            return None
        limits = self._seed_constraints
        bias = None if limits.logit_bias is None else limits.logit_bias.double().tolist()
        cut = [limits.termination_token_ids, limits.min_length, limits.max_length, bias]
        text = json.dumps([self._demonstrations, self._seed_prompts, cut])
        return hashlib.sha256(text.encode()).hexdigest()

    def _sampler(self, first_trajectory: int, merge: bool) -> Sampler:
        return Sampler(self.policy, self.config, self.grammar, first_trajectory, merge)

    def reward_temperature(self, step: int, micro: int) -> float:
        """That of the step, or with a conditioning the target temperature of the micro-batch, uniform."""
        config = self.config
        if config.conditioning is None:
            return config.reward_temperature_at(step)
        return float(self._rng(_TARGETS, step, micro).uniform(*config.target_temperatures))

    def _rng(self, stream: int, *index: int) -> np.random.Generator:
        """A generator of its own for every (stream, step, micro-batch), so there is no state to save."""
        return np.random.default_rng([self.config.seed, stream, *index])

    def _retemper(self, reward: Reward) -> None:
        """Order the buffer by R under the temperatures that the factors of a product have now."""
        if isinstance(reward, ProductReward):
            self.buffer.retemper(reward.temperatures)

    def _judge(self, reward: Reward, *, needs_log_q: bool = False) -> Judge:
        return Judge(self.policy, reward, self.grammar, self.config.max_tokens, needs_log_q)

    def _of_sequences(
        self, prompts: Sequence[Sequence[int]], group: Sequence[int], sequences: Sequence[Sequence[int]]
    ) -> Rollouts:
        has_grammar = self.grammar is not None
        return of_sequences(prompts, group, sequences, self.constraints, has_grammar=has_grammar)

    def _fresh(self, prompts: list[list[int]], now: _Now) -> Rollouts:
        """Draws, the last `epsilon_share` of each prompt's with uniform tokens among them."""
        config, num = self.config, self.config.num_samples
        if not num:
            return self._of_sequences(prompts, [], [])
        temperature, epsilon = self._temperatures(now.step, now.micro), config.epsilon_at(now.step)
        plain = num - (round(config.epsilon_share * num) if epsilon else 0)
        options, parts = SamplingOptions(epsilon=epsilon), []
        for rows, option in ((slice(plain), None), (slice(plain, num), options)):
            own = temperature[:, rows]
            if own.numel():
                drawn = now.sampler(
                    prompts, own.shape[1], self.constraints, temperature=own.flatten(), options=option
                )
                parts.append(drawn)
        return parts[0] if len(parts) == 1 else joined(*parts)

    def _temperatures(self, step: int, micro: int) -> Tensor:
        """(G, num_samples) temperatures: the first `tempered_share` of each prompt's samples are tempered."""
        config = self.config
        shape = (config.prompts_per_step, config.num_samples)
        tempered = round(config.tempered_share_at(step) * config.num_samples)
        low, high = config.temperature_range
        values = torch.from_numpy(self._rng(_TEMPERATURES, step, micro).uniform(low, high, size=shape))
        values[:, tempered:] = 1.0
        return values

    def _searched(self, fresh: Rollouts, now: _Now) -> list[Rollouts]:
        """What local search accepts."""
        config, num = self.config, self.config.local_search_samples_at(now.step)
        if not num:
            return []
        rng = self._rng(_SEARCH, now.step, now.micro)
        accept = config.local_search_accept
        judge = self._judge(now.reward, needs_log_q=accept == "metropolis")
        start = self._starts(fresh, num, judge, rng, now)
        if start is None:
            return []

        def grow(rollouts: Rollouts, prefixes: list[list[int]]) -> Rollouts:
            prompts = [rollouts.prompts[g] for g in rollouts.group.tolist()]
            grown = now.sampler(prompts, 1, self.constraints, options=SamplingOptions(prefixes=prefixes))
            unknown = torch.full_like(grown.log_behavior, torch.nan)
            return replace(grown, prompts=rollouts.prompts, group=rollouts.group, log_behavior=unknown)

        return search.search(
            start,
            grow=grow,
            judge=None if accept == "always" else judge,
            rounds=config.local_search_rounds,
            accept=accept,
            reward_temperature=now.reward_temperature,
            rng=rng,
        )

    def _starts(
        self, fresh: Rollouts, num: int, judge: Judge, rng: np.random.Generator, now: _Now
    ) -> search.Points | None:
        """Where searches begin; None where nothing is stored yet."""
        source, pool = self.config.local_search_from, fresh
        if source == "buffer":
            pool = self._stored(fresh, num, rng, now)
        elif source == "random":
            pool = chosen(fresh, search.random_rows(fresh, num, rng))
        if pool is None:
            return None
        if source != "best" and self.config.local_search_accept == "always":
            zeros = torch.zeros(pool.num_trajectories, dtype=torch.float64)
            return search.Points(pool, zeros, zeros)
        log_reward, log_q = judge(pool)
        if source != "best":
            return search.Points(pool, log_reward, log_q)
        rows = search.best_rows(pool, log_reward, num)
        return search.Points(chosen(pool, rows), log_reward[rows], log_q[rows])

    def _replayed(self, fresh: Rollouts, now: _Now) -> list[Rollouts]:
        num = self.config.replay_samples_at(now.step)
        found = self._stored(fresh, num, self._rng(_REPLAY, now.step, now.micro), now) if num else None
        return [] if found is None else [found]

    def _stored(self, fresh: Rollouts, num: int, rng: np.random.Generator, now: _Now) -> Rollouts | None:
        """Of every prompt up to `num` entries of the buffer, None where it has none."""
        return self.buffer.sample(fresh, num, rng, temperature=now.reward_temperature, version=now.step)

    def _shown(self, indices: list[int], now: _Now) -> list[Rollouts]:
        """Demonstrations of the prompts."""
        num = self.config.demonstration_samples_at(now.step)
        if not num:
            return []
        rng, group, sequences = self._rng(_DEMONSTRATIONS, now.step, now.micro), [], []
        for g, i in enumerate(indices):
            given = self._demonstrations[i]
            rows = np.sort(rng.permutation(len(given))[:num]).tolist()
            group += [g] * len(rows)
            sequences += [given[k] for k in rows]
        if not sequences:
            return []
        return [self._of_sequences([self._prompts[i] for i in indices], group, sequences)]

    def _check_some(self, rollouts: Rollouts) -> None:
        """That there is something to train on for every prompt."""
        counts = torch.bincount(rollouts.group, minlength=len(rollouts.prompts))
        none = (counts == 0).nonzero()[:, 0].tolist()
        if none:
            have = f"none for prompt {rollouts.prompts[none[0]].tolist()[:20]}"
            want = "a stored sequence of every prompt where num_samples is 0"
            fix = "draw some, or pass demonstrations or seed_prompts"
            checks.fail("Trainer.step", "the replay buffer", want, have, fix)


def _together(parts: Sequence[tuple[Origin, Rollouts]]) -> tuple[Rollouts, Tensor]:
    """All rows, and where each comes from."""
    whole = parts[0][1]
    for _, part in parts[1:]:
        whole = whole.extended(part)
    sizes = torch.tensor([part.num_trajectories for _, part in parts])
    return whole, torch.tensor([int(kind) for kind, _ in parts]).repeat_interleave(sizes)
