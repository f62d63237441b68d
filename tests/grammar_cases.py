"""Grammars over a tiny vocabulary, everything that q can draw under them, and rollouts of given sequences."""

import torch
from automaton import Automaton

from fastgfn.types import Constraints, Rollouts

V, STOP, OTHER_STOP = 13, 0, 12
TEXTS = [None, "a", "b", "c", "ab", "bc", "bb", "d", "abb", "ca", "aa", "e", None]
# abb?c?, one to four tokens; and (ab|c)*, which may be empty and goes on for ever
SHORT = ({0: {"a": 1}, 1: {"b": 2}, 2: {"b": 3, "c": 4}, 3: {"c": 4}, 4: {}}, {2, 3, 4})
LOOP = ({0: {"a": 1, "c": 0}, 1: {"b": 0}}, {0})
BIAS = torch.where(torch.arange(V) == 2, -1.5, 0.3)
PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3]]


class Stops(Automaton):
    """Every termination token may follow what is accepted."""

    def __init__(self, kind, stops=(STOP,)):
        super().__init__(*kind, TEXTS, stops[0])
        self.stops, self.calls = stops, []

    def allowed(self, sequences):
        self.calls.append([tuple(z) for z in sequences])
        return super().allowed(sequences)

    def row(self, state):
        row = super().row(state)
        row[list(self.stops)] = row[self.stops[0]].clone()
        return row


def language(grammar, limits):
    """Every Z that q can draw, those that max_length cuts among them."""
    found, open_prefixes = [], [[]]
    while open_prefixes:
        z = open_prefixes.pop()
        allowed = grammar.allowed([z])[0]
        stops = list(limits.termination_token_ids)
        if len(z) == limits.max_length or (len(z) >= limits.min_length and bool(allowed[stops].any())):
            found.append(z)
        if len(z) < limits.max_length:
            allowed[stops] = False
            open_prefixes += [[*z, t] for t in allowed.nonzero()[:, 0].tolist()]
    return found


CASES = {
    "short": (SHORT, {}),
    "min_length": (SHORT, dict(min_length=2)),
    "bias": (SHORT, dict(logit_bias=BIAS)),
    "stops": (SHORT, dict(extra_termination_token_ids=(OTHER_STOP,))),
    "cut": (SHORT, dict(max_length=2)),
    "loop": (LOOP, dict(max_length=3)),
    "everything": (
        LOOP,
        dict(min_length=1, max_length=3, logit_bias=BIAS, extra_termination_token_ids=(OTHER_STOP,)),
    ),
}


def make(case, **change):
    kind, options = CASES[case]
    limits = Constraints(STOP, **({"max_length": 4} | options | change))
    return Stops(kind, limits.termination_token_ids), limits


def rollouts_of(sequences, group, limits, prompts=PROMPTS, has_grammar=True):
    tokens = torch.zeros(len(sequences), limits.max_length, dtype=torch.int64)
    for row, z in zip(tokens, sequences, strict=True):
        row[: len(z)] = torch.tensor(z, dtype=torch.int64)
    lengths = torch.tensor([len(z) for z in sequences], dtype=torch.int64)
    zeros = torch.zeros(len(sequences))
    prompts = tuple(torch.tensor(p) for p in prompts)
    return Rollouts(
        prompts, torch.tensor(group).long(), tokens, lengths, zeros, limits, has_grammar=has_grammar
    )
