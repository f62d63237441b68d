"""A small problem of which everything is known: its sampler, its posterior, its log Z."""

from itertools import product

import torch

from fastgfn.evaluate import sequence_log_probs
from fastgfn.rewards import SequenceReward
from fastgfn.types import Constraints


def value(z):
    """Log R: long sequences of large tokens are the good ones."""
    return 0.5 * sum(z) - 1.5 * len(z)


class Problem:
    def __init__(self, policy, vocab, *, min_length=0, max_length=3, temperature=1.0, prompts=((1, 2),)):
        self.policy = policy
        self.prompts = [list(p) for p in prompts]
        self.constraints = Constraints(0, min_length=min_length, max_length=max_length)
        lengths = range(min_length, max_length + 1)
        self.space = [list(z) for k in lengths for z in product(range(1, vocab), repeat=k)]
        self.lengths = torch.tensor([len(z) for z in self.space])
        self.temperature = temperature
        self.log_r = torch.tensor([value(z) for z in self.space], dtype=torch.float64)
        self.log_z = float((self.log_r / temperature).logsumexp(0))
        self.log_target = self.log_r / temperature - self.log_z

    @property
    def target(self):
        """The fields of `Target`."""
        return dict(
            prompts=self.prompts,
            constraints=self.constraints,
            reward=SequenceReward(lambda zs: [value(z) for z in zs]),
            reward_temperature=self.temperature,
        )

    def log_q(self, prompt=0):
        return sequence_log_probs(
            self.prompts[prompt], self.space, policy=self.policy, constraints=self.constraints
        )[0]
