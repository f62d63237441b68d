"""Small worlds and batches for the tests of the losses."""

import itertools
import math

import torch


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=rtol, atol=atol)


def padded_rows(lengths=(3, 1, 5, 0, 5, 2), width=5, dtype=torch.float64):
    """(log_pf (N, T), states (2, N, T + 1), lengths), NaN on the padding."""
    lengths = torch.tensor(lengths)
    column = torch.arange(width + 1)
    log_pf = -torch.rand(len(lengths), width).to(dtype)
    states = -3 * torch.rand(2, len(lengths), width + 1).to(dtype)
    log_pf[column[:-1] >= lengths[:, None]] = torch.nan
    states[:, column > lengths[:, None]] = torch.nan
    return log_pf, states, lengths


class World:
    """All strings of two tokens up to max_length with random rewards, and the sampler q = weight / Z exactly.

    Rows are all the strings: log_pf (S, L), log_pterm and log_reward (S, L + 1), NaN on the padding.
    """

    def __init__(self, log_reward, max_length=3, log_target=None):
        self.max_length = max_length
        alphabet = [itertools.product((0, 1), repeat=n) for n in range(max_length + 1)]
        self.strings = [s for strings in alphabet for s in strings]
        self.log_r = {s: log_reward(s) for s in self.strings}
        self.weight = self.log_r if log_target is None else {s: log_target(s) for s in self.strings}
        self.log_z = self.flow(())
        self.lengths = torch.tensor([len(s) for s in self.strings])
        shape = len(self.strings), max_length
        self.log_pf = torch.full(shape, torch.nan, dtype=torch.float64)
        self.log_pterm = torch.full((shape[0], max_length + 1), torch.nan, dtype=torch.float64)
        self.log_reward = self.log_pterm.clone()
        for row, s in enumerate(self.strings):
            for k in range(len(s) + 1):
                prefix = s[:k]
                self.log_pterm[row, k] = self.weight[prefix] - self.flow(prefix)
                self.log_reward[row, k] = self.log_r[prefix]
                if k < len(s):
                    self.log_pf[row, k] = self.flow(s[: k + 1]) - self.flow(prefix)

    def flow(self, prefix):
        """log of the sum of weights of the strings that start with the prefix."""
        below = [w for s, w in self.weight.items() if s[: len(prefix)] == prefix]
        top = max(below)
        return top + math.log(sum(math.exp(w - top) for w in below))

    def with_stop(self):
        """(log_pf (S, L + 1) with the stop last, log_reward (S,), lengths + 1)."""
        rows, last = torch.arange(len(self.strings)), self.lengths
        log_pf = torch.nn.functional.pad(self.log_pf, (0, 1), value=torch.nan)
        log_pf[rows, last] = self.log_pterm[rows, last]
        return log_pf, self.log_reward[rows, last], last + 1


def is_stationary(loss, leaves, atol=1e-12):
    """Whether the loss is 0 with zero gradient in all leaves."""
    grads = torch.autograd.grad(loss, leaves)
    return abs(loss.item()) <= atol and all(float(g.abs().max()) <= atol for g in grads)
