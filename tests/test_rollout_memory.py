"""Memory of the running batch: predicted, refused beforehand, and run out of."""

from types import SimpleNamespace

import pytest
import torch
from family_models import make_policy

from fastgfn.checks import InputError
from fastgfn.models import Policy
from fastgfn.models.linear import Linear
from fastgfn.rollout import Drafts, PromptLookup, engine, sample, sampling
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
    policy = tiny_policy()
    options = dict(constraints=Constraints(0, max_length=6), num_samples=40, merge=False)
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


def from_sample(recorded):
    return [warning for warning in recorded if "sample" in str(warning.message)]


@pytest.fixture
def planned(monkeypatch):
    """Samples with so many bytes free; the batch size, and how many layers were merged while drawing."""
    found = []

    class Noted(engine.Engine):
        def __init__(self, policy, request, drawer, batch_size):
            found.append((batch_size, sum(layer.merged is not None for layer in policy._linear)))
            super().__init__(policy, request, drawer, batch_size)

    def run(policy, free, **options):
        monkeypatch.setattr(type(policy), "free_bytes", lambda self: free)
        monkeypatch.setattr(sampling, "choose_engine", lambda *args: Noted)
        options = dict(constraints=Constraints(0, max_length=6), num_samples=64, seed=4) | options
        rollouts = sample([[1, 2, 3]], policy=policy, **options)
        return rows(rollouts), *found.pop()

    return run


def test_merged_copies_are_counted_before_they_are_made(tiny_policy, planned, recwarn):
    policy = tiny_policy()
    own, largest = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32 * 48
    copies = policy.merged_bytes()
    assert copies == 8 * (own + largest)
    assert policy.merged_bytes(torch.bfloat16) == 2 * own + 8 * largest

    def need(size):  # the prompt, and 6 nodes per sequence
        return policy.node_bytes * (3 + 6 * size)

    want, size, merged = planned(policy, 2 * need(64) + copies)
    assert (size, merged) == (64, 14)
    # a batch of half the size at least, by default of half of what the copies leave free
    assert planned(policy, 2 * need(32) + copies) == (want, 32, 14)
    assert planned(policy, need(40) + copies, batch_size=40) == (want, 40, 14)
    assert planned(policy, need(40) + policy.merged_bytes(torch.bfloat16), batch_size=40,
                   precision=torch.bfloat16)[1:] == (40, 14)  # fmt: skip
    assert not from_sample(recwarn)
    for free, options, size in (
        (need(40) + copies - 1, {"batch_size": 40}, 40),
        (need(40), {"batch_size": 40, "precision": torch.bfloat16}, 40),
        (2 * need(4) + copies, {}, 16),
        (copies // 2, {}, 8),
        (2 * need(2), {}, 2),
    ):
        match = "no memory for merged weights .*, drawing with unmerged ones"
        with pytest.warns(UserWarning, match=match) as made:
            assert planned(policy, free, **options) == (want, size, 0), free
        # the caller's line
        assert made[0].filename == __file__


def test_nothing_is_counted_that_is_not_copied(tiny_policy, planned, recwarn):
    policy = tiny_policy()
    free = policy.node_bytes * (3 + 6 * 64) * 2
    assert planned(policy, free, merge=False)[1:] == (64, 0)
    # too short for merging
    assert planned(policy, free, constraints=Constraints(0, max_length=3))[1:] == (64, 0)
    trained = make_policy("llama", torch.float32, trainable=True)
    assert trained.merged_bytes() == 0
    for layer in policy._linear:
        layer.merge(None)
        layer.merged = layer.merged._replace(weight=layer.weight.clone())
        layer.unmerge(keep=True)
    assert policy.merged_bytes() == 0
    assert not from_sample(recwarn)


@pytest.mark.parametrize("first", [None, torch.bfloat16, torch.float32])
def test_memory_of_copies_in_another_dtype_serves_none_in_this(tiny_policy, monkeypatch, first):
    policy = tiny_policy()
    want = {dtype: policy.merged_bytes(dtype) for dtype in (None, torch.bfloat16, torch.float32)}
    monkeypatch.setattr("fastgfn.ops.linear.packed", lambda weight: weight)
    monkeypatch.setattr(Policy, "may_keep", lambda self, num_bytes: True)
    with policy.merged(first):
        pass
    assert all(layer.spare is not None for layer in policy._linear)
    assert {dtype: policy.merged_bytes(dtype) for dtype in want} == want | {first: 0}


def test_what_explicit_classes_gather_in_decoding_is_counted(planned):
    policy = make_policy("gptj", torch.float32)
    layer_bytes = 2 * 4 * 8 * 4  # keys and values, heads, width, float32
    assert policy.path_bytes == layer_bytes and policy.node_bytes == 2 * layer_bytes
    assert make_policy("gpt2", torch.float32).path_bytes == 0
    # paths of 3 + 6 nodes, of which a layer's are gathered for each of 40 rows at a time
    need = policy.node_bytes * (3 + 6 * 40) + layer_bytes * 40 * 9
    options = dict(batch_size=40, merge=False)
    assert planned(policy, need, **options)[1] == 40
    with pytest.raises(InputError, match="batch_size must be so small .* got 40, .*; lower batch_size to 16"):
        planned(policy, need - 1, **options)
    # five rows of a trajectory at a time
    with pytest.raises(InputError, match="batch_size must be so small .* got 8, .*; lower batch_size to 2"):
        planned(policy, policy.node_bytes * (3 + 14 * 8) + layer_bytes * 40 * 9 - 1, merge=False,
                batch_size=8, drafts=Drafts(PromptLookup(), length=4))  # fmt: skip
