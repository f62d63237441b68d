"""Memory of the running batch: predicted, refused beforehand, and run out of."""

from types import SimpleNamespace

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.models import Policy
from fastgfn.models.linear import Linear
from fastgfn.rollout import engine, sample
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1]]


def rows(rollouts):
    return list(zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True))


def test_out_of_memory_starts_the_unfinished_again_in_half_the_batch(tiny_policy, monkeypatch):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=6, seed=4)
    want = sample(PROMPTS, policy=policy, **options)
    hidden, left = Policy.hidden, SimpleNamespace(passes=2)

    def fails_later(self, tokens, *rest):
        left.passes -= 1
        if left.passes == -1 or (left.passes < 0 and len(tokens) > 5 and left.passes > -9):
            raise torch.OutOfMemoryError("no room")
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Policy, "hidden", fails_later)
    with pytest.warns(UserWarning, match="out of memory, going on with batch_size="):
        got = sample(PROMPTS, policy=policy, **options)
    assert rows(got) == rows(want)
    torch.testing.assert_close(got.log_behavior, want.log_behavior, rtol=0, atol=1e-5)


def test_out_of_memory_in_the_first_prefill_halves_the_batch(tiny_policy, monkeypatch):
    policy, hidden, passes = tiny_policy(), Policy.hidden, []

    def fails_first(self, *args):
        passes.append(1)
        if len(passes) == 1:
            raise MemoryError
        return hidden(self, *args)

    monkeypatch.setattr(Policy, "hidden", fails_first)
    with pytest.warns(UserWarning, match="going on with batch_size=10$"):
        sample(PROMPTS, policy=policy, constraints=Constraints(0, max_length=2), num_samples=6, batch_size=20)


def test_no_memory_for_merged_weights_draws_with_unmerged_ones(tiny_policy, monkeypatch):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=3, seed=4)
    want = rows(sample(PROMPTS, policy=policy, **options))
    merge, done = Linear.merge, []

    def fails_later(self, dtype):
        done.append(merge(self, dtype))
        if len(done) == 3:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Linear, "merge", fails_later)
    with pytest.warns(UserWarning, match="out of memory for merged weights, drawing with unmerged ones"):
        assert rows(sample(PROMPTS, policy=policy, **options)) == want
    assert len(done) == 3 and all(layer.merged is None for layer in policy._linear)


def test_out_of_memory_with_one_trajectory_keeps_the_finished_ones(tiny_policy, monkeypatch):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=1, seed=4)
    want = rows(sample(PROMPTS, policy=policy, **options))
    hidden, seen = Policy.hidden, []

    def fails_on_the_last(self, tokens, *rest):
        seen.append(tokens.tolist())
        if tokens.tolist() == PROMPTS[-1]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Policy, "hidden", fails_on_the_last)
    with pytest.raises(engine.OutOfMemory, match="4 of 5 trajectories are finished") as error:
        sample(PROMPTS, policy=policy, batch_size=1, **options)
    assert rows(error.value.rollouts) == want[:4]


def test_other_errors_pass_through(tiny_policy, monkeypatch):
    def fails(self, *args):
        raise RuntimeError("no such kernel")

    policy = tiny_policy()
    monkeypatch.setattr(Policy, "hidden", fails)
    with pytest.raises(RuntimeError, match="no such kernel"):
        sample(PROMPTS, policy=policy, constraints=Constraints(0), num_samples=1)


def test_more_than_fits_is_refused_before_the_first_token(tiny_policy, monkeypatch, seen_tokens):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=40)
    assert policy.node_bytes == 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, width, float64
    del seen_tokens[:]
    # three prompts at most, and 6 nodes per trajectory
    monkeypatch.setattr(type(policy), "free_bytes", lambda self: policy.node_bytes * (12 + 6 * 20))
    with pytest.raises(
        InputError, match=r"batch_size must be so small .* got 200, .*; lower batch_size to 8"
    ):
        sample(PROMPTS, policy=policy, batch_size=200, **options)
    assert not seen_tokens
    sample(PROMPTS, policy=policy, batch_size=8, **options)
    sample(PROMPTS, policy=policy, **options)
    monkeypatch.setattr(type(policy), "free_bytes", lambda self: 100)
    with pytest.raises(InputError, match="got 1, .*; shorten the prompts or lower max_length"):
        sample(PROMPTS, policy=policy, **options)
