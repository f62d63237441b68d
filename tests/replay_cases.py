"""Rollouts of given sequences, and the p-value of counts."""

import torch

from fastgfn.types import Constraints, Rollouts

PROMPT = [1, 2]


def rollouts_of(sequences, prompts=(PROMPT,), group=None, log_behavior=None):
    width = max([1, *map(len, sequences)])
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    return Rollouts(
        tuple(torch.tensor(p) for p in prompts),
        torch.tensor(group if group is not None else [0] * len(sequences)),
        tokens,
        torch.tensor([len(s) for s in sequences]),
        torch.zeros(len(sequences)) if log_behavior is None else torch.tensor(log_behavior),
        Constraints(0, max_length=width),
    )


def add(buffer, sequences, rewards, *, version=0, **kw):
    values = torch.tensor(rewards, dtype=torch.float64)
    return buffer.add(rollouts_of(sequences, **kw), values, version=version)


def p_value(counts, probabilities):
    """Of a chi-squared test of counts against probabilities, all of which expect five at least."""
    counts, p = torch.tensor(counts, dtype=torch.float64), torch.tensor(probabilities, dtype=torch.float64)
    assert abs(float(p.sum()) - 1) < 1e-9
    want = counts.sum() * p
    assert float(want.min()) >= 5
    statistic = ((counts - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2.0).double(), statistic / 2))
