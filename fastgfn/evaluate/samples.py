"""The samples that estimators read: drawn from a sampler, or given, with log R and log q of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.ops.scan import tree_cumsum
from fastgfn.ops.tree import path_nodes
from fastgfn.packing import pack, split_tree
from fastgfn.rewards import Reward, log_reward
from fastgfn.rollout import SamplingOptions, sample
from fastgfn.scoring import score
from fastgfn.types import Constraints, Grammar, Rollouts, TreePart, as_int64

# A trainer numbers its trajectories from 0. A policy depends on the noise that it was trained with, so that
# draws with the same noise, which its own seed would give, are no draws of q.
FIRST_TRAJECTORY = 2**60


@dataclass(frozen=True, slots=True)
class Target:
    """A sampler and the unnormalised target R^(1/T) that it is held against, over the sequences of G prompts.

    policy: the sampler q, at temperature 1.
    prompts: G token-id sequences.
    constraints, grammar: the sequence set.
    reward: see fastgfn.rewards; un-tempered.
    reward_temperature: T, > 0.
    batch_size, precision: of `sample`. Estimators use the density of what was drawn, in this precision.
    max_tokens: most tree nodes of one forward of the policy or the reward, see `split_tree`.
    """

    policy: Policy
    prompts: Sequence[Sequence[int] | Tensor]
    constraints: Constraints
    reward: Reward
    reward_temperature: float = 1.0
    grammar: Grammar | None = None
    batch_size: int | None = None
    precision: torch.dtype | None = None
    max_tokens: int | None = 8192

    def __post_init__(self) -> None:
        check_temperatures("Target", "reward_temperature", [self.reward_temperature])
        num = len(self.prompts)
        checks.check(num > 0, "Target", "prompts", "at least one prompt", num, "pass a list of token ids")

    def draw(
        self,
        num_samples: int,
        *,
        seed: int,
        first_trajectory: int = 0,
        temperature: float | Tensor = 1.0,
        options: SamplingOptions | None = None,
    ) -> Rollouts:
        """`num_samples` trajectories of every prompt, ordered by prompt, with noise that no training has
        seen, whatever the seed."""
        return sample(
            self.prompts,
            policy=self.policy,
            constraints=self.constraints,
            num_samples=num_samples,
            temperature=temperature,
            options=options,
            grammar=self.grammar,
            seed=seed,
            first_trajectory=FIRST_TRAJECTORY + first_trajectory,
            batch_size=self.batch_size,
            precision=self.precision,
        )

    def parts(self, rollouts: Rollouts) -> tuple[TreePart, ...]:
        """The rollouts as trees that fit into one forward; duplicates and shared prefixes are one node."""
        tree = pack(rollouts, grammar=self.grammar, device=self.policy.device)
        return split_tree(tree, max_tokens=self.max_tokens)

    @torch.no_grad()
    def log_rewards(self, rollouts: Rollouts) -> Tensor:
        """(N,) float64 un-tempered log R of every trajectory."""
        found = torch.zeros(rollouts.num_trajectories, dtype=torch.float64)
        for part in self.parts(rollouts):
            value = log_reward(part.tree, reward=self.reward)[part.tree.leaf]
            found[part.trajectories.cpu()] = value.double().cpu()
        return found

    def check_prompts(self, name: str, rollouts: Rollouts) -> None:
        """Refuse rollouts of other prompts or another sequence set."""
        num, fix = self.num_groups, "draw them for the prompts that are passed, in their order"
        have = len(rollouts.prompts)
        checks.check(have == num, name, "rollouts", f"of {num} prompts", have, fix)
        for g, pair in enumerate(zip(self.prompts, rollouts.prompts, strict=True)):
            want, have = (as_int64(p).tolist() for p in pair)
            checks.check(have == want, name, f"prompts[{g}] of the rollouts", want, have, fix)
        both = (self.constraints, rollouts.constraints)
        for limit in ("termination_token_ids", "min_length", "max_length", "termination"):
            want, have = (getattr(c, limit) for c in both)
            checks.check(have == want, name, f"{limit} of the rollouts", want, have, "use one sequence set")
        own, given = (None if c.logit_bias is None else c.logit_bias.tolist() for c in both)
        fix = "use one sequence set"
        checks.check(own == given, name, "logit_bias of the rollouts", "the target's", "another", fix)

    @property
    def num_groups(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class Samples:
    """N trajectories over G prompts with what the diagnostics read; on the CPU.

    rollouts: log_behavior is NaN where nobody knows what drew them.
    log_q: (N,) float64, log q(x) of the policy as `score` computes it, the stop included.
    log_stop: (N,) float64, log q(stop | x), 0 where max_length ends a sequence.
    log_reward: (N,) float64, un-tempered log R(x).
    log_pf: (N, L) float64, log q of every action as `score` computes it, 0 elsewhere.
    """

    rollouts: Rollouts
    log_q: Tensor
    log_stop: Tensor
    log_reward: Tensor
    log_pf: Tensor

    @property
    def num_groups(self) -> int:
        return len(self.rollouts.prompts)

    @property
    def log_behavior(self) -> Tensor:
        """(N,) float64; what drew the trajectories, in its precision."""
        return self.rollouts.log_behavior.double()

    @property
    def groups(self) -> list[Tensor]:
        """G index tensors: the trajectories of each prompt."""
        return [(self.rollouts.group == g).nonzero()[:, 0] for g in range(self.num_groups)]


@torch.no_grad()
def measure(target: Target, rollouts: Rollouts) -> Samples:
    """Log q and log R of given trajectories: drawn, replayed or demonstrated.

    Raises:
        InputError: other prompts or constraints than the target's, a prompt without a trajectory, a reward
            that is not finite.
    """
    target.check_prompts("measure", rollouts)
    counts = torch.bincount(rollouts.group, minlength=target.num_groups)
    want, fix = "at least one trajectory of every prompt", "drop the prompts without one"
    checks.check(bool((counts > 0).all()), "measure", "rollouts", want, counts.tolist(), fix)
    num, width = rollouts.tokens.shape
    log_q, log_stop, rewards = (torch.zeros(num, dtype=torch.float64) for _ in range(3))
    log_pf = torch.zeros(num, width, dtype=torch.float64)
    for part in target.parts(rollouts):
        tree, rows = part.tree, part.trajectories.cpu()
        log_probs = score(tree, policy=target.policy)
        own = log_probs.log_pf.double()
        stop = log_probs.log_pterm.double()
        log_q[rows] = (tree_cumsum(own, tree.parent) + stop)[tree.leaf].cpu()
        log_stop[rows] = stop[tree.leaf].cpu()
        rewards[rows] = log_reward(tree, reward=target.reward)[tree.leaf].double().cpu()
        nodes = path_nodes(tree.parent.cpu(), tree.leaf.cpu(), rollouts.lengths[rows], width)
        log_pf[rows] = own.cpu()[nodes.clamp(min=0)].masked_fill(nodes < 0, 0.0)
    return Samples(rollouts, log_q, log_stop, rewards, log_pf)


def draw_exact(
    prompts: Sequence[Sequence[int] | Tensor],
    sequences: Sequence[Sequence[Sequence[int]]],
    log_probs: Sequence[Tensor],
    *,
    constraints: Constraints,
    num_samples: int,
    seed: int = 0,
    has_grammar: bool = False,
) -> Rollouts:
    """Independent draws from enumerated posteriors, one per prompt.

    Args:
        prompts: G token-id sequences.
        sequences: of every prompt, the S_g sequences of its posterior.
        log_probs: of every prompt, (S_g,) normalised log-probabilities.
        num_samples: draws per prompt.
        has_grammar: whether the posterior is one under a grammar.

    Returns: Rollouts ordered by prompt; log_behavior is the exact log-probability.

    Raises:
        InputError: log_probs that do not sum to 1, or not one list of sequences and tensor per prompt.
    """
    name, fix = "draw_exact", "give one per prompt"
    for arg, value in (("sequences", sequences), ("log_probs", log_probs)):
        checks.check(len(value) == len(prompts), name, arg, f"{len(prompts)} of them", len(value), fix)
    check_num_samples(name, num_samples)
    generator = torch.Generator().manual_seed(seed)
    chosen, behavior = [], []
    for g, (space, values) in enumerate(zip(sequences, log_probs, strict=True)):
        values = values.detach().double().cpu()
        checks.check_shape(name, f"log_probs[{g}]", values, (len(space),), "give one per sequence")
        total = float(values.exp().sum())
        fix = "subtract their logsumexp"
        checks.check(abs(total - 1) <= 1e-6, name, f"log_probs[{g}]", "normalised", f"a sum of {total}", fix)
        index = torch.multinomial(values.exp(), num_samples, replacement=True, generator=generator)
        chosen += [space[i] for i in index.tolist()]
        behavior.append(values[index])
    lengths = torch.tensor([len(z) for z in chosen])
    tokens = torch.zeros(len(chosen), constraints.max_length, dtype=torch.int64)
    for row, z in zip(tokens, chosen, strict=True):
        row[: len(z)] = as_int64(z)
    group = torch.arange(len(prompts)).repeat_interleave(num_samples)
    drawn = (group, tokens, lengths, torch.cat(behavior).float())
    return Rollouts(tuple(as_int64(p) for p in prompts), *drawn, constraints, has_grammar=has_grammar)


def check_num_samples(name: str, num_samples: int) -> None:
    ok = type(num_samples) is int and num_samples >= 1
    checks.check(ok, name, "num_samples", "an int >= 1", repr(num_samples), "raise it")


def check_temperatures(name: str, arg: str, values: Sequence[float]) -> None:
    ok = len(values) > 0 and all(0 < t < float("inf") for t in values)
    checks.check(ok, name, arg, "> 0 and finite", list(values), "use e.g. 1.0")


def check_support(name: str, options: SamplingOptions | None) -> None:
    if options is None:
        return
    fix = "leave filters out: epsilon and temperature keep full support"
    is_cut = options.top_k is not None or (options.top_p or 1.0) < 1.0 or (options.min_p or 0.0) > 0.0
    have = {k: v for k, v in options.filters.items() if v is not None}
    checks.check(not is_cut, name, "options", "a behaviour that can draw every sequence", have, fix)
    fix = "log_behavior does not hold their density: leave them out"
    checks.check(options.prefixes is None, name, "prefixes", "None", "some", fix)
