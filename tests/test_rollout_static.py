"""A slot per trajectory: the same draws as the engine that shares rows, through refills, moves and errors."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.ops.path_attention import path_attention_triton
from fastgfn.rollout import OutOfMemory, SamplingOptions, engine, sample, sampling, slots, static
from fastgfn.rollout.draws import Drawer
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1], [4, 5]]
LOG_PROBS = ("log_behavior", "log_pf", "log_pterm")


@pytest.fixture
def by_slots(monkeypatch):
    """`sample` with slots on the CPU, which share even the shortest prompts, and the engines that it made."""

    def with_slots(*args, poll_every=3, least_moved=1, least_shared=1, shuffle=False, **options):
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
            patch.setattr(slots, "LEAST_SHARED", least_shared)
            return sample(*args, **options), made

    return with_slots


def num_prompt_nodes(made):
    return made.pool.num_taken - len(made.workspace.slots) * made.max_length


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
    assert num_prompt_nodes(made) == 0 and not made.resident


CONSTRAINTS = {
    "one token": Constraints(0, max_length=1),
    "fixed length": Constraints(0, 4, 4),
    "long enough": Constraints(0, 3, 5),
    "own termination": Constraints(0, 2, 5, termination="own"),
    "masked": Constraints(0, 1, 5, logit_bias=torch.where(torch.arange(13) < 9, 0.0, -99.0)),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_limits(tiny_policy, by_slots, name):
    options = dict(policy=tiny_policy(), constraints=CONSTRAINTS[name], num_samples=6, seed=2)
    want = sample(PROMPTS, **options)
    assert_same(by_slots(PROMPTS, batch_size=5, poll_every=2, first_trajectory=0, **options)[0], want)
    assert name in ("one token", "fixed length") or want.terminated.any() and not want.terminated.all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_the_queue_and_the_numbers_of_trajectories_do_not_matter(
    tiny_policy, by_slots, family, seed
):
    torch.manual_seed(seed)
    options = dict(policy=tiny_policy(family=family), constraints=Constraints(0, max_length=6), num_samples=4)
    options |= dict(seed=-3, first_trajectory=2**40)
    want = sample(PROMPTS, **options)
    got, (made,) = by_slots(PROMPTS, batch_size=3, poll_every=2, shuffle=True, **options)
    assert_same(got, want)
    assert num_prompt_nodes(made) == 0


@pytest.mark.parametrize("poll_every", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [5, 10])
def test_few_running_slots_go_on_in_a_smaller_bucket(tiny_policy, by_slots, num_samples, poll_every):
    # likelier terminations, so that lengths spread
    bias = torch.zeros(13).index_fill_(0, torch.tensor([0]), 0.7)
    constraints = Constraints(0, max_length=20, logit_bias=bias)
    options = dict(policy=tiny_policy(), constraints=constraints, num_samples=num_samples)
    want = sample(PROMPTS, seed=1, **options)
    got, (made,) = by_slots(PROMPTS, seed=1, poll_every=poll_every, **options)
    assert_same(got, want)
    assert made.num_moves >= (2 if poll_every < 3 else 1) and made.size < len(made.workspace.slots)
    # every slot kept nodes of its own
    assert made.running.first.unique().numel() == made.size == len(made.running)
    whole, (made,) = by_slots(PROMPTS, seed=1, poll_every=poll_every, least_moved=64, **options)
    assert_same(whole, want)
    assert made.num_moves == 0


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("tile_rows", [3, 4, 16])
def test_slots_of_one_prompt_are_in_tiles(tiny_policy, by_slots, monkeypatch, tile_rows, batch_size):
    """After every refill and move, with prompts that are long enough and others; at every step the op
    refuses tiles of different prompts."""
    monkeypatch.setattr(slots, "TILE_ROWS", tile_rows)
    counts, events = [], []

    def checked(made):
        share(made)
        held = (made.holds >= 0).nonzero()[:, 0]
        prompt = made._prompts_of(made.holds[held])
        is_long = torch.tensor([len(p) > 1 for p in made.request.distinct])[prompt]
        same = (prompt[:, None] == prompt) & is_long
        want = torch.zeros(len(made.running), dtype=torch.int64)
        want[held] = made.running.depth[held] * (same.sum(1) > 1)
        assert torch.equal(made.running.shared, want)
        tiles, in_tiles = made.running.tiles, (want > 0).nonzero()[:, 0]
        assert torch.equal(tiles[tiles >= 0].sort()[0].long(), in_tiles)
        used = -(-prompt[is_long].unique(return_counts=True)[1] // tile_rows)
        counts.append(int((tiles[:, 0] >= 0).sum()))
        assert len(in_tiles) / tile_rows <= counts[-1] <= int(used.sum())
        assert bool((tiles[: counts[-1], 1] >= 0).all())
        most = min(made.workspace.num_tiles, len(made.running) // 2)
        assert counts[-1] <= most and bool((tiles[most:] < 0).all())

    share = static.StaticEngine._share
    monkeypatch.setattr(static.StaticEngine, "_share", checked)
    for name in ("fill", "move"):
        method = getattr(slots.Slots, name)
        monkeypatch.setattr(slots.Slots, name, lambda *a, n=name, m=method: events.append(n) or m(*a))
    bias = torch.zeros(13).index_fill_(0, torch.tensor([0]), 0.7)
    options = dict(policy=tiny_policy(), constraints=Constraints(0, 1, 20, logit_bias=bias), num_samples=10)
    want = sample(PROMPTS, seed=1, **options)
    got, _ = by_slots(PROMPTS, seed=1, batch_size=batch_size, least_shared=2, poll_every=1, **options)
    assert_same(got, want)
    assert events.count("move") > 1 and (batch_size is None or events.count("fill") > 3)
    assert len(counts) == len(events) and counts[0] > 0 and len(set(counts)) > 1


@pytest.fixture
def num_tiles(monkeypatch):
    """Tiles of every step, 0 where it has no table."""
    seen, attention = [], slots.PathAttention

    def noted(*args):
        seen.append(0 if args[-1] is None else len(args[-1].tiles))
        return attention(*args)

    monkeypatch.setattr(slots, "PathAttention", noted)
    return seen


@pytest.mark.parametrize(
    ("least", "num_samples", "batch_size", "tiles"),
    [(4, 1, 6, 1), (4, 20, 60, 3), (5, 20, 60, 0), (1, 1, 6, 3), (1, 8, 1, 0), (1, 8, 5, 2)],
)
def test_how_many_tiles_a_step_has(tiny_policy, by_slots, num_tiles, least, num_samples, batch_size, tiles):
    """None where no prompt is long enough or has two slots."""
    prompts = [*PROMPTS, PROMPTS[3]]
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=2), num_samples=num_samples)
    by_slots(prompts, batch_size=batch_size, least_shared=least, least_moved=64, **options)
    assert set(num_tiles) == {tiles}


@pytest.mark.parametrize("least", [32, 999], ids=["shared", "alone"])
def test_draws_are_the_same_through_the_kernels_of_gpus(tiny_policy, by_slots, monkeypatch, least):
    """In the place of the CPU's attention; a prompt of two splits, and slots of no tile."""
    calls = []

    def by_triton(*inputs, scale, softcap, window, shared):
        calls.append(shared is not None and bool((shared.tiles >= 0).any()))
        return path_attention_triton(*inputs, scale, softcap or 0.0, window or 0, *(shared or ()))

    prompts = [[1, 2, 3, 4, 5] * 27, [4, 5]]
    policy = tiny_policy(dtype=torch.float32, positions=256)
    options = dict(policy=policy, constraints=Constraints(0, 1, 3), num_samples=2, seed=5)
    want = sample(prompts, **options)
    monkeypatch.setattr("fastgfn.attention.path_attention", by_triton)
    got, _ = by_slots(prompts, least_shared=least, **options)
    assert set(calls) == {least == 32}
    assert_same(got, want)


def test_buckets():
    assert [static.bucket(n) for n in (1, 2, 3, 9, 500, 512, 513, 1025)] == [
        1,
        2,
        4,
        16,
        512,
        512,
        1024,
        1536,
    ]


@pytest.fixture
def passes(monkeypatch):
    """Tokens of every forward pass, by kind of attention."""
    from fastgfn.models import Policy

    seen, hidden = [], Policy.hidden

    def counted(self, tokens, position, attention):
        seen.append((type(attention).__name__, len(tokens)))
        return hidden(self, tokens, position, attention)

    monkeypatch.setattr(Policy, "hidden", counted)
    return seen


def prefilled(passes):
    return [count for kind, count in passes if kind == "TreeAttention"]


def test_prompts_are_computed_once_and_steps_have_one_shape(tiny_policy, by_slots, passes):
    policy = tiny_policy()
    options = dict(policy=policy, constraints=Constraints(0, max_length=6), num_samples=8)
    for batch_size, parts in ((None, [7]), (4, None)):
        del passes[:]
        by_slots(PROMPTS, batch_size=batch_size, least_moved=64, **options)
        assert prefilled(passes) == parts or parts is None and sum(prefilled(passes)) <= 10
        steps = {count for kind, count in passes if kind == "PathAttention"}
        assert steps == {64 if batch_size is None else batch_size}


def test_a_prompt_is_forgotten_where_the_pool_is_full_and_computed_again(tiny_policy, by_slots, passes):
    """Three prompts of three tokens that come in turns, in a pool of two."""
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]] * 3
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=2), num_samples=1)
    want = sample(prompts, batch_size=9, **options)
    del passes[:]
    got, (made,) = by_slots(prompts, batch_size=1, **options)
    assert_same(got, want)
    assert 9 < sum(prefilled(passes)) < 27 and len(made.pool.token) == 6 + 2


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_is_forgotten_that_a_slot_needs(tiny_policy, by_slots, passes, seed):
    prompts = [[i, j, 3] for i in (1, 5, 7) for j in (2, 4, 8)] * 3
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=9), num_samples=1, seed=seed)
    want = sample(prompts, batch_size=27, **options)
    torch.manual_seed(seed)
    del passes[:]
    got, _ = by_slots(prompts, batch_size=3, poll_every=1, shuffle=True, **options)
    assert_same(got, want)
    assert sum(prefilled(passes)) > 27  # some were


def test_prompts_are_prefilled_together(tiny_policy, by_slots, passes):
    """A slot that becomes free waits for a quarter of the batch before a new prompt is computed."""
    prompts = [[i, j] for i in range(1, 9) for j in range(1, 9)]
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=6), num_samples=1)
    want = sample(prompts, **options)
    del passes[:]
    got, _ = by_slots(prompts, batch_size=16, poll_every=1, **options)
    assert_same(got, want)
    # 64 prompts in parts of at least 4 after the first 16
    assert 3 < len(prefilled(passes)) <= 13


def test_states_that_are_not_finite_are_refused_at_the_next_look(tiny_policy, by_slots, monkeypatch):
    from fastgfn.models import Policy

    policy, constraints = tiny_policy(), Constraints(0, 4, 6)
    message = "sample: hidden states must be finite, got nan or inf; the weights have diverged: lower"
    hidden, seen = Policy.hidden, []

    def diverges(self, *args):
        seen.append(args)
        out = hidden(self, *args)
        return out.index_fill(0, torch.tensor([0]), torch.nan) if len(seen) == 2 else out

    monkeypatch.setattr(Policy, "hidden", diverges)
    with pytest.raises(InputError, match=message):
        by_slots(PROMPTS, policy=policy, constraints=constraints, num_samples=2)
    del seen[:]
    with pytest.raises(InputError, match=message):
        sample(PROMPTS, policy=policy, constraints=constraints, num_samples=2)


@pytest.mark.parametrize("marked", [False, True], ids=["cpu", "cuda"])
def test_a_mask_that_leaves_nothing_is_refused(tiny_policy, by_slots, monkeypatch, marked):
    """Also where the draw says so by -1, as on CUDA; such a token must not reach the embedding."""
    constraints = Constraints(0, 1, 6, logit_bias=torch.full((13,), -torch.inf))
    message = "logits must be "
    if marked:
        drawn = Drawer.from_hidden

        def bad(self, hidden, *, position, **options):
            draw = drawn(self, hidden, position=position, **options)
            return replace(draw, token=draw.token.masked_fill(position == 2, -1))

        monkeypatch.setattr(Drawer, "from_hidden", bad)
        constraints = Constraints(0, 4, 6)
        message = (
            "sample: logits must be a token left in every row, got none or nan; widen the vocabulary mask"
        )
    with pytest.raises(InputError, match=message):
        by_slots(PROMPTS, policy=tiny_policy(), constraints=constraints, num_samples=2)


def test_out_of_memory(tiny_policy, by_slots, monkeypatch):
    """The unfinished start again in half the batch; the last error holds what was finished."""
    from fastgfn.models import Policy

    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=6), num_samples=6, seed=4)
    want = sample(PROMPTS, policy=policy, **options)
    hidden, left = Policy.hidden, SimpleNamespace(passes=9, always=False)

    def fails_later(self, tokens, *rest):
        left.passes -= 1
        if left.passes < 0 and (len(tokens) > 5 or left.always):
            raise torch.OutOfMemoryError("no room")
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Policy, "hidden", fails_later)
    with pytest.warns(UserWarning, match="out of memory, going on with batch_size="):
        got, (made,) = by_slots(PROMPTS, policy=policy, batch_size=8, **options)
    assert_same(got, want)
    assert made.batch_size == 4 and made.size <= 4
    left.passes, left.always = 9, True
    with pytest.raises(OutOfMemory, match="one trajectory running") as error, pytest.warns(UserWarning):
        by_slots(PROMPTS, policy=policy, batch_size=2, **options)
    found = error.value.rollouts
    assert 0 < found.num_trajectories < want.num_trajectories
    assert all(sequence in want.sequences() for sequence in found.sequences())


def test_running_out_while_a_graph_is_captured_counts_as_running_out():
    try:
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert engine.is_out_of_memory(error)
    assert not engine.is_out_of_memory(RuntimeError("shapes differ"))


def test_memory_is_predicted_for_whole_buckets(tiny_policy, by_slots, monkeypatch):
    policy, constraints = tiny_policy(), Constraints(0, max_length=6)
    # the pool of 16 slots and prompts of 3 + 2 tokens
    monkeypatch.setattr(type(policy), "free_bytes", lambda self: policy.node_bytes * (16 * 6 + 5))
    options = dict(policy=policy, constraints=constraints, num_samples=40, merge=False)
    with pytest.raises(InputError, match="batch_size must be so small that its keys and values fit"):
        by_slots([[1, 2, 3], [4, 5]], batch_size=17, **options)
    _, (made,) = by_slots([[1, 2, 3], [4, 5]], batch_size=9, **options)
    assert made.size <= len(made.workspace.slots) == 16
    _, (made,) = by_slots([[1, 2, 3], [4, 5]], **options)
    assert len(made.workspace.slots) == 4  # half of the free memory


def test_which_engine_samples(tiny_policy):
    def choice(device="cuda", is_static=True, options=None, **hooks):
        policy = SimpleNamespace(device=torch.device(device), has_static_step=is_static)
        request = SimpleNamespace(prefixes=None, grammar=None, tool=None, drafts=None)
        vars(request).update(hooks)
        drawer = SimpleNamespace(needs_logits=(options or SamplingOptions()).needs_logits)
        return sampling.choose_engine(policy, request, drawer)

    assert choice() is static.StaticEngine
    others = [choice("cpu"), choice(is_static=False), choice(options=SamplingOptions(epsilon=0.1))]
    others += [choice(options=SamplingOptions(top_k=2))]
    others += [choice(**{hook: object()}) for hook in ("prefixes", "grammar", "tool", "drafts")]
    assert set(others) == {engine.Engine}
