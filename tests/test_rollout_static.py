"""Slots and steps of static shape: the same draws as the engine that shares rows, no value read by a step."""

import pytest
import torch

from fastgfn.rollout import sample, sampling, static
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1], [4, 5]]
LOG_PROBS = ("log_behavior", "log_pf", "log_pterm")


@pytest.fixture
def by_slots(monkeypatch):
    """`sample` with slots on the CPU, and the engines that it made."""

    def with_slots(*args, poll_every=3, least_moved=1, shuffle=False, **options):
        made = []

        class Kept(static.StaticEngine):
            def __init__(self, *args):
                super().__init__(*args, poll_every=poll_every)
                if shuffle:
                    self.waiting = self.waiting[torch.randperm(len(self.waiting))]
                made.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(sampling, "choose_engine", lambda *args: Kept)
            patch.setattr(static, "LEAST_MOVED", least_moved)
            return sample(*args, **options), made

    return with_slots


def assert_same(got, want):
    for name in ("group", "tokens", "lengths", "terminated", "is_action"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.sequences() == want.sequences()
    for name in LOG_PROBS:
        have, expected = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(have, expected, rtol=0, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("poll_every", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, None])
def test_draws_are_those_of_the_other_engine(tiny_policy, by_slots, batch_size, poll_every):
    """Equal and nested prompts, more prompts than slots, a temperature per trajectory."""
    generator = torch.Generator().manual_seed(1)
    options = dict(policy=tiny_policy(), constraints=Constraints(0, 1, 7), num_samples=5, seed=4)
    options["temperature"] = 0.5 + torch.rand(5 * len(PROMPTS), generator=generator)
    want = sample(PROMPTS, **options)
    got, (made,) = by_slots(PROMPTS, batch_size=batch_size, poll_every=poll_every, **options)
    assert_same(got, want)
    assert len({tuple(s) for s in want.sequences()}) > 10 and len(set(want.lengths.tolist())) > 3
    assert made.pool.num_taken == 0 and not made.resident
