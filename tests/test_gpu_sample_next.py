"""Draws at a real vocabulary and in CUDA graphs, which the interpreter cannot run."""

import math

import pytest
import torch

from fastgfn.functional import sample_next, sample_next_from_hidden

pytestmark = pytest.mark.gpu
VOCAB, STOP = 128256, 2
FIELDS = ("token", "log_pf", "log_pterm", "log_behavior")


def p_value(token, z):
    """Of the chi-squared statistic of draws against softmax(z); tokens expected below 5 times are pooled."""
    expected, observed = z.softmax(0) * len(token), torch.bincount(token, minlength=len(z))
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc((len(expected) - 1) / 2 * torch.ones_like(statistic), statistic / 2))


# Eight tests at p > 1e-3 / 8.
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_chi_squared_of_a_real_vocabulary(form, forbid, temperature):
    n = 2**18
    hidden, weight = torch.randn(1, 64, device="cuda"), torch.randn(VOCAB, 64, device="cuda") * 0.3
    options = dict(rows=torch.zeros(n, dtype=torch.int64, device="cuda"), temperature=temperature, seed=11)
    options |= dict(termination_token_id=STOP)
    options |= dict(forbid_termination=torch.full((n,), forbid, device="cuda"))
    z = (hidden.double() @ weight.double().T)[0]
    if form == "logits":
        draw = sample_next(z.float()[None], **options)
    else:
        draw = sample_next_from_hidden(hidden, weight, **options)
    if forbid:
        z[STOP] = -math.inf
    assert p_value(draw.token, z / temperature) > 1e-3 / 8
    error = (draw.log_pf - z.log_softmax(0)[draw.token]).abs().max()
    assert float(error) <= 1e-4


def captured(draw):
    """A graph of draw, after a run on another stream, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        draw()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = draw()
    return graph, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_draws_replay_in_a_cuda_graph(form, dtype):
    """With a new position, and from hidden states a new seed, a replay gives the draws of a new call."""
    num_draws = 40
    hidden = torch.randn(8, 256, device="cuda", dtype=dtype)
    weight = torch.randn(VOCAB, 256, device="cuda", dtype=dtype) * 0.1
    logits = hidden @ weight.T
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    position = torch.zeros(num_draws, dtype=torch.int64, device="cuda")
    options = dict(rows=torch.arange(num_draws, device="cuda") % 8, position=position, temperature=0.8)
    options |= dict(termination_token_id=STOP)

    def draw():
        if form == "logits":
            return sample_next(logits, seed=5, **options)
        return sample_next_from_hidden(hidden, weight, seed=seed, **options)

    graph, out = captured(draw)
    tokens = []
    for value in (0, 1, -(2**40)):
        position.fill_(abs(value) % 7)
        seed.fill_(value)
        graph.replay()
        have = [getattr(out, name).clone() for name in FIELDS]
        want = draw()
        assert all(torch.equal(x, getattr(want, name)) for x, name in zip(have, FIELDS, strict=True))
        tokens.append(have[0])
    assert not torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[1], tokens[2])
