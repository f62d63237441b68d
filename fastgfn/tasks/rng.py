"""Random integers: teach a language model to draw uniformly from 0..100 (Hu et al. 2024, section 2).

The target over token sequences Z of at most max_length tokens is
    log R(Z) = 0                              if Z spells one of the integers 0..100
    log R(Z) = -penalty * max(1, len(Z))      otherwise,
so log Z = log(101 + sum over the others) in closed form. The penalty has to grow with the length: a flat one
lets the V^k other strings of k tokens outweigh the integers. At 16 nats per token they keep 5.5e-5 of the
target's mass (V = 49152), at 18 nats 7.4e-6.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.models import Policy
from fastgfn.rewards import SequenceReward
from fastgfn.types import Constraints

TEXT = "The following is a random integer drawn uniformly between 0 and 100:"
LARGEST = 100


@dataclass(frozen=True, slots=True)
class RandomIntegers:
    """prompt: token ids. numbers: token ids of "0".."100". penalty: nats per token of any other sequence."""

    prompt: list[int]
    numbers: list[list[int]]
    constraints: Constraints
    penalty: float
    vocab_size: int

    @property
    def reward(self) -> SequenceReward:
        valid = {tuple(n) for n in self.numbers}

        def log_r(sequences: list[list[int]]) -> list[float]:
            return [0.0 if tuple(s) in valid else -self.penalty * max(1, len(s)) for s in sequences]

        return SequenceReward(log_r)

    @property
    def invalid_weight(self) -> float:
        """Sum of R over every sequence that is no integer, in closed form."""
        by_length = [sum(len(n) == k for n in self.numbers) for k in range(self.constraints.max_length + 1)]
        total = math.exp(-self.penalty)
        for k in range(1, self.constraints.max_length + 1):
            total += math.exp(k * (math.log(self.vocab_size - 1) - self.penalty))
            total -= by_length[k] * math.exp(-self.penalty * k)
        return total

    @property
    def log_z(self) -> float:
        return math.log(len(self.numbers) + self.invalid_weight)

    @property
    def invalid_mass(self) -> float:
        """The target's own probability of everything but the integers."""
        return self.invalid_weight / (len(self.numbers) + self.invalid_weight)

    def log_probs(self, policy: Policy) -> Tensor:
        """(101,) float64, exact log q of every integer."""
        return sequence_log_probs(self.prompt, self.numbers, policy=policy, constraints=self.constraints)[0]

    def evaluate(self, policy: Policy) -> dict[str, float]:
        """Exact distances to the target and |log F(s_0) - log Z|; one tree forward, nothing is sampled.

        log F(s_0) = log R(empty) - log q(stop | s_0) is the flow that the policy implies at the prompt.
        """
        log_q, log_stop = sequence_log_probs(
            self.prompt, self.numbers, policy=policy, constraints=self.constraints
        )
        log_target = torch.full_like(log_q, -self.log_z)
        log_flow = -self.penalty - float(log_stop)
        result = divergence(log_q, log_target, self.invalid_mass).to_dict()
        return result | {"log_z_error": abs(log_flow - self.log_z)}


def random_integers(
    policy: Policy,
    *,
    text: str | None = None,
    terminator: str = "newline",
    min_length: int = 0,
    max_length: int = 4,
    penalty: float = 16.0,
) -> RandomIntegers:
    """The task for a policy's tokenizer.

    Args:
        text: the prompt; defaults to the paper's sentence, followed by a newline if the terminator is one,
            else by a space.
        terminator: "newline", "eos", or a token id.
        max_length: most tokens of Z, at least as many as the longest integer needs.
        penalty: nats per token, > log V, else the invalid sequences would dominate the target.

    Raises:
        InputError: limits or penalty out of range, a terminator that is not one token of the vocabulary.
    """
    name = "rng"
    stop = _termination_token(policy, terminator)
    prompt = policy.encode(text if text is not None else TEXT + ("\n" if terminator == "newline" else " "))
    numbers = [policy.encode(str(i)) for i in range(LARGEST + 1)]
    constraints = Constraints(stop, min_length=min_length, max_length=max_length)
    longest = max(map(len, numbers))
    checks.check(
        max_length >= longest,
        name,
        "max_length",
        f">= {longest}, the tokens of '{LARGEST}'",
        max_length,
        "raise it",
    )
    checks.check(min_length == 0, name, "min_length", "0", min_length, "the integers 0..9 are single tokens")
    floor = math.log(policy.vocab_size)
    checks.check(
        math.isfinite(penalty) and penalty > floor,
        name,
        "penalty",
        f"> log V = {floor:.1f} nats per token",
        penalty,
        "use 16 to 18, or invalid strings dominate the target",
    )
    unique = {tuple(n) for n in numbers}
    spelled = len(unique) == len(numbers) and all(stop not in n and len(n) > 0 for n in numbers)
    checks.check(
        spelled, name, "terminator", "a token that is in no integer", terminator, "pass another --terminator"
    )
    return RandomIntegers(prompt, numbers, constraints, penalty, policy.vocab_size)


def _termination_token(policy: Policy, terminator: str) -> int:
    if terminator == "newline":
        ids = policy.encode("\n")
        checks.check(
            len(ids) == 1, "rng", "terminator", "one token", f"{len(ids)} tokens for a newline", "use 'eos'"
        )
        return ids[0]
    if terminator == "eos":
        eos = policy.tokenizer.eos_token_id
        checks.check(
            eos is not None, "rng", "terminator", "defined", "a tokenizer without eos", "pass a token id"
        )
        return eos
    try:
        token = int(terminator)
    except ValueError:
        token = -1
    checks.check(
        0 <= token < policy.vocab_size,
        "rng",
        "terminator",
        f"'newline', 'eos' or a token id in [0, {policy.vocab_size})",
        repr(terminator),
        "pass one of these",
    )
    return token
