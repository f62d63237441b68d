"""Steps as CUDA graphs: when they are captured, what they hold, when they serve again."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from rollout_cases import static_engine

from fastgfn.models.shapes import random_policy
from fastgfn.ops.quantized import LEAST_CAPABILITY
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack
from fastgfn.rollout import engine, graphs, sample, sampling, slots, static
from fastgfn.rollout.graphs import Steps
from fastgfn.scoring import score
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6]]


@pytest.fixture
def done(monkeypatch):
    """What stand-ins for the graphs did: a capture runs nothing, replays of it run the step that it saw."""
    done = []

    class OnCpu(Steps):
        def __init__(self, *args):
            super().__init__(*args)
            self.uses_graphs = True

        def _warm_up(self, slots):
            done.append(("warm up", len(slots)))
            self.step(slots)

        def _captured(self, slots):
            done.append(("capture", len(slots)))

            def replay():
                done.append(("replay", len(slots)))
                self.step(slots)

            return SimpleNamespace(replay=replay)

    monkeypatch.setattr(graphs, "Steps", OnCpu)
    return done


def test_every_bucket_warms_up_and_is_captured_once(tiny_policy, monkeypatch, done):
    """The order of it, with stand-ins for the graphs: a capture runs nothing, replays of it run the step."""
    monkeypatch.setattr(static, "LEAST_MOVED", 1)
    bias = torch.zeros(13).index_fill_(0, torch.tensor([0]), 0.7)
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1], [4, 5]]
    setting = tiny_policy(), Constraints(0, max_length=20, logit_bias=bias), prompts, 10
    replayed = static_engine(*setting, 60, poll_every=1)
    with torch.no_grad():
        got = replayed.run()
        monkeypatch.setattr(graphs, "Steps", Steps)
        want = static_engine(*setting, 60, poll_every=1).run()
    assert got.sequences() == want.sequences() and torch.equal(got.log_pf, want.log_pf)
    sizes = list(dict.fromkeys(size for _, size in done))
    assert len(sizes) == replayed.num_moves + 1 >= 3
    for size in sizes:
        assert [what for what, s in done if s == size][:3] == ["warm up", "capture", "replay"]
    assert [what for what, _ in done].count("capture") == len(sizes)


@pytest.fixture
def by_graphs(monkeypatch, done):
    """`sample` with slots and stand-ins; it returns the rollouts and how many captures they took."""
    from fastgfn.models import Policy

    monkeypatch.setattr(Policy, "may_keep", lambda self, num_bytes: True)

    def sample_by_graphs(*args, **options):
        del done[:]
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "choose_engine", lambda *args: static.StaticEngine)
            return sample(*args, **options), [what for what, _ in done].count("capture")

    return sample_by_graphs


def assert_same(got, want):
    assert got.sequences() == want.sequences()
    for name in ("log_behavior", "log_pf", "log_pterm"):
        pair = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5, equal_nan=True, msg=name)


def test_graphs_serve_later_calls(tiny_policy, by_graphs):
    """Through another seed, mask, temperatures, numbers, prompts and weights."""
    policy = tiny_policy()
    bias = torch.zeros(13)
    calls = [
        (PROMPTS, dict(seed=1)),
        (PROMPTS, dict(seed=2)),
        (PROMPTS, dict(seed=2, logit_bias=bias.index_fill(0, torch.tensor([3]), -5.0))),
        (PROMPTS, dict(seed=-(2**60), temperature=1.7, first_trajectory=2**33)),
        ([[7], [8, 9], [1, 2, 3], [4]], dict(seed=3)),
        ([[7], [8, 9], [1, 2, 3], [4]], dict(seed=3, change=0.7)),
        ([[7], [8, 9], [1, 2, 3], [4]], dict(seed=3)),
    ]
    seen = []
    for i, (prompts, options) in enumerate(calls):
        constraints = Constraints(0, 1, 8, logit_bias=options.pop("logit_bias", bias))
        with torch.no_grad():
            for _, p in policy.parameters():
                p.mul_(options.get("change", 1.0))
        options.pop("change", None)
        options |= dict(policy=policy, constraints=constraints, num_samples=5)
        got, captures = by_graphs(prompts, **options)
        kept = policy.kept
        assert captures == (1 if i == 0 else 0) and kept is not None
        seen.append(got.sequences())
        want = sample(prompts, **options)
        assert policy.kept is None  # the other engine wants the memory
        policy.kept = kept
        assert_same(got, want)
    assert len({str(s) for s in seen}) == len(calls) - 1


def test_graphs_go_when_what_they_hold_changes(tiny_policy, by_graphs):
    policy = tiny_policy()

    def captures(prompts=PROMPTS, min_length=1, max_length=8, num_samples=5, bias=None, **options):
        constraints = Constraints(0, min_length, max_length, logit_bias=bias)
        options |= dict(policy=policy, constraints=constraints, num_samples=num_samples)
        got, count = by_graphs(prompts, **options)
        kept = policy.kept
        assert_same(got, sample(prompts, **options))
        policy.kept = kept
        return count

    assert captures() == 1 and captures() == 0
    for change in (
        dict(min_length=2),
        dict(max_length=9),
        dict(num_samples=9),
        dict(bias=torch.zeros(13)),
        dict(merge=False),
    ):
        assert captures(**change) == 1 and captures(**change) == 0, change
        assert captures() == 1
    long = [list(range(1, 13)) * 3]
    assert captures(long, num_samples=20) == 1  # wider
    assert captures() == 0
    merged = policy._linear[0]
    assert captures() == 0
    merged.spare = None
    pad = [torch.empty(merged.weight.shape, dtype=merged.weight.dtype) for _ in range(3)]
    assert captures() == 1 and pad
    layer = merged.layer
    layer.scaling["default"] *= 2
    assert captures() == 1 and captures() == 0
    layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.detach().clone())
    assert captures() == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([[i, j] for i in range(1, 6) for j in range(1, 6)], [list(range(1, 13)) * 3]),
        ([[1, 2]], [[i, j] for i in range(1, 6) for j in range(1, 6)]),
    ],
    ids=["wider", "more"],
)
def test_larger_prompts_need_new_memory(tiny_policy, by_graphs, first, second):
    policy = tiny_policy()
    for prompts, captures in ((first, 1), (second, 1), (first, 0), (second, 0)):
        options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=25 // len(prompts))
        got, count = by_graphs(prompts, **options)
        kept = policy.kept
        assert count == captures
        assert_same(got, sample(prompts, **options))
        policy.kept = kept


def test_more_tiles_need_another_graph(tiny_policy, by_graphs, monkeypatch):
    """Fewer do not, nor do tables of other slots."""
    monkeypatch.setattr(slots, "LEAST_SHARED", 2)
    policy = tiny_policy()
    for prompts, captures, tiles in (
        ([[1], [2]], 1, 0),
        ([[1, 2], [2]], 1, 1),
        ([[1], [2, 3]], 0, 1),
        ([[1, 2], [2, 3]], 1, 2),
        ([[3, 4], [3, 4]], 0, 2),
        ([[1], [2]], 0, 2),
    ):
        options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=8)
        got, count = by_graphs(prompts, **options)
        kept = policy.kept
        assert count == captures and kept.num_tiles == tiles
        assert_same(got, sample(prompts, **options))
        policy.kept = kept


def test_slots_that_moved_are_in_order_again(tiny_policy, by_graphs, monkeypatch):
    monkeypatch.setattr(static, "LEAST_MOVED", 1)
    monkeypatch.setattr(static.StaticEngine.__init__, "__defaults__", (1,))
    policy, moves = tiny_policy(), []
    move = static.Slots.move
    monkeypatch.setattr(static.Slots, "move", lambda self, at: moves.append(at) or move(self, at))
    bias = torch.zeros(13).index_fill_(0, torch.tensor([0]), 0.7)
    for seed in range(4):
        options = dict(policy=policy, constraints=Constraints(0, 1, 20, logit_bias=bias), num_samples=15)
        got, _ = by_graphs(PROMPTS, seed=seed, **options)
        kept = policy.kept
        assert_same(got, sample(PROMPTS, seed=seed, **options))
        policy.kept = kept
        assert len(moves) > seed


def test_nothing_is_kept_where_memory_may_not_stay_taken(tiny_policy, by_graphs, monkeypatch):
    policy = tiny_policy()
    asked = []
    monkeypatch.setattr(type(policy), "may_keep", lambda self, n: asked.append(n) or False)
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5)
    assert by_graphs(PROMPTS, **options)[1] == by_graphs(PROMPTS, **options)[1] == 1
    assert policy.kept is None and min(asked) > 8 * 32 * policy.node_bytes // 2
    assert all(layer.spare is None for layer in policy._linear)


def test_a_capture_reads_no_casts_that_autocast_keeps(monkeypatch):
    """They are no part of the graph: it would read them after they are gone."""
    weight, x, found = torch.ones(3, 3, requires_grad=True), torch.ones(1, 3), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    steps = Steps(lambda slots: found.append((x @ weight).sum().item()), torch.device("cpu"))
    steps.stream = steps.memory = None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps(range(4))
        weight.add_(1.0)
        assert steps._captured(range(4)) == "graph" and torch.is_autocast_cache_enabled()
    assert found == [9.0, 18.0]


def test_a_cpu_keeps_nothing(tiny_policy):
    assert not tiny_policy().may_keep(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_cannot_be_told_is_not_taken_for_the_same(tiny_policy, by_graphs, dtype):
    """Packed copies, as quantised weights, have no address."""
    policy = tiny_policy(dtype=dtype)
    options = dict(policy=policy, constraints=Constraints(0, 1, 8), num_samples=5)
    with policy.merged():
        packed = any(layer.merged.weight.is_mkldnn for layer in policy._linear)
        assert (policy.addresses() == policy.addresses()) == (not packed)
    assert policy.addresses() == policy.addresses()
    for captures in (1, 1 if packed else 0):
        got, count = by_graphs(PROMPTS, **options)
        assert count == captures
        if dtype == torch.float32:
            kept = policy.kept
            assert_same(got, sample(PROMPTS, **options))
            policy.kept = kept


def test_merged_copies_stay_where_they_are_and_never_are_the_weights(tiny_policy, monkeypatch):
    policy = tiny_policy()
    monkeypatch.setattr(type(policy), "may_keep", lambda self, num_bytes: True)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}

    def merged():
        with policy.merged():
            weights = [layer.merged.weight for layer in policy._linear]
            return weights, [x.clone() for x in weights]

    with policy._adapter_off():
        plain, _ = merged()
    assert all(x is layer.base.weight for x, layer in zip(plain, policy._linear, strict=True))
    copies, values = merged()
    with policy._adapter_off():
        merged()
    again, values_again = merged()
    assert all(x is y for x, y in zip(copies, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(values, values_again, strict=True))
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_copies_in_8_bits_stay_where_they_are_and_follow_the_weights(tiny_policy, monkeypatch):
    """What a graph holds: their values change in place, and another precision is another address."""
    policy = tiny_policy()
    monkeypatch.setattr(type(policy), "may_keep", lambda self, num_bytes: True)

    def merged(dtype):
        with policy.merged(dtype):
            copies = [x.clone() for layer in policy._linear for x in layer.merged.tensors]
            return policy.addresses(), copies

    addresses, copies = merged(torch.float8_e4m3fn)
    assert {x.dtype for x in copies} == {torch.float8_e4m3fn, torch.float32}
    with torch.no_grad():
        for _, p in policy.parameters():
            p.mul_(0.5)
    again, changed = merged(torch.float8_e4m3fn)
    assert again == addresses
    assert not any(torch.equal(x.float(), y.float()) for x, y in zip(copies, changed, strict=True))
    assert addresses != merged(None)[0] != merged(torch.float8_e4m3fn)[0]
    first, copies = merged(torch.int8)
    assert (first == merged(torch.int8)[0]) == (not any(x.is_mkldnn for x in copies))


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_draws_with_weights_of_8_bits():
    """Again from the same graphs, with log-probs of what drew; near those of the policy."""
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("no products of float8 on this GPU")
    policy = random_policy("tiny", dtype=torch.bfloat16, device="cuda")
    options = dict(policy=policy, constraints=Constraints(0, 1, 12), num_samples=16, seed=1)
    options |= dict(precision=torch.float8_e4m3fn)
    first, again = sample(PROMPTS, **options), sample(PROMPTS, **options)
    assert first.sequences() == again.sequences() and torch.equal(first.log_behavior, again.log_behavior)
    tree = pack(first, device=policy.device)
    for merged, most in ((True, 0.05), (False, 0.1)):
        with policy.merged(torch.float8_e4m3fn) if merged else contextlib.nullcontext():
            scored = score(tree, policy=policy)
        density = tree_cumsum(scored.log_pf, tree.parent) + scored.log_pterm
        gaps = (first.log_behavior - density[tree.leaf].cpu()).abs() / (first.lengths + 1)
        assert float(gaps.mean()) < most


@pytest.mark.gpu
@pytest.mark.parametrize("times", [1, 40], ids=["short", "shared"])
@pytest.mark.parametrize("batch_size", [5, 16, None])
def test_replayed_steps_draw_as_the_other_engine(monkeypatch, batch_size, times):
    """Through refills, moves and several buckets; a graph is captured once for each."""
    policy = random_policy("tiny", device="cuda")
    prompts = [p * times for p in ([1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6])]
    bias = torch.zeros(512).index_fill_(0, torch.tensor([0]), 4.0)
    options = dict(policy=policy, constraints=Constraints(0, 1, 40, logit_bias=bias), num_samples=16)
    made, captured = [], []

    class Kept(static.StaticEngine):
        def __init__(self, *args):
            super().__init__(*args, poll_every=4)
            made.append(self)

    capture = graphs.Steps._captured
    monkeypatch.setattr(graphs.Steps, "_captured", lambda *args: captured.append(args) or capture(*args))
    monkeypatch.setattr(sampling, "choose_engine", lambda *args: Kept)
    got = sample(prompts, batch_size=batch_size, **options)
    sizes = [len(slots) for _, slots in captured]
    assert len(sizes) == len(set(sizes)) >= 1 and (batch_size is not None or made[0].num_moves)
    assert (made[0].workspace.num_tiles > 0) == (times > 1)
    monkeypatch.setattr(sampling, "choose_engine", lambda *args: engine.Engine)
    want = sample(prompts, batch_size=batch_size, **options)
    assert got.sequences() == want.sequences()
    for name in ("log_behavior", "log_pf", "log_pterm"):
        pair = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(*pair, rtol=0, atol=1e-4, equal_nan=True, msg=name)


@pytest.mark.gpu
@torch.no_grad()
def test_replays_wait_for_nothing():
    policy, constraints = random_policy("tiny", device="cuda"), Constraints(0, 1, 20)
    replayed, plain = (static_engine(policy, constraints, [[1, 2], [3, 4, 5]], 8, 16) for _ in range(2))
    with policy.merged():
        for one in (replayed, plain):
            one._admit()
            one.workspace.steps.uses_graphs = one is replayed
            for _ in range(2):
                one.workspace.steps(one.running)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for one in (replayed, plain):
                for _ in range(8):
                    one.workspace.steps(one.running)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert replayed.workspace.steps.graphs[16] is not None and not plain.workspace.steps.graphs
    for name in ("tokens", "lengths", "finished", "log_pf", "log_behavior", "hidden"):
        assert torch.equal(getattr(replayed.workspace.slots, name), getattr(plain.workspace.slots, name)), (
            name
        )
