"""The step over slots: what it reads, what it writes, and as a CUDA graph."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from family_models import EXPLICIT, FAMILIES, VOCAB, make_policy

from fastgfn.attention import KeyValues
from fastgfn.checks import InputError
from fastgfn.functional import values
from fastgfn.models.probe import HostReads
from fastgfn.models.shapes import random_policy
from fastgfn.rollout import SamplingOptions, engine, sample, sampling, static
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.slots import Slots, step_of
from fastgfn.types import Constraints


def static_engine(policy, constraints, prompts, num_samples, batch_size, **options):
    group = torch.arange(len(prompts)).repeat_interleave(num_samples)
    tensors = [torch.tensor(p) for p in prompts]
    request = engine.Request(tensors, group, constraints, torch.ones(len(group)), 0)
    drawer = Drawer(policy, constraints, SamplingOptions(), 4)
    return static.StaticEngine(policy, request, drawer, batch_size, **options)


def test_no_slot_writes_to_nodes_of_others(tiny_policy):
    """Keys and values of prompts and of finished slots stay, whatever the other slots do."""
    policy, constraints = tiny_policy(), Constraints(0, max_length=6)
    made = static_engine(policy, constraints, [[1, 2], [3, 4, 5]], 4, batch_size=8)
    with torch.no_grad():
        made._admit()
        layers = [x for pair in made.kv.layers.values() for x in pair]
        for x in layers:
            x[made.first_node :] = 0
        before = [x[: made.first_node].clone() for x in layers]
        for _ in range(4):
            own = made.slots.first + (made.slots.lengths - 1).clamp(min=0)
            kept = [x[made.first_node :].clone() for x in layers]
            made.steps(made.slots)
            for x, old in zip(layers, kept, strict=True):
                changed = (x[made.first_node :] != old).flatten(1).any(1).nonzero()[:, 0] + made.first_node
                ran = made.slots.first + (made.slots.lengths - 1).clamp(min=0)
                assert set(changed.tolist()) <= set(ran.tolist()) | set(own.tolist())
    for x, old in zip(layers, before, strict=True):
        taken = made.pool.holds > 0
        assert torch.equal(x[: made.first_node][taken], old[taken]) and int(taken.sum()) == 5


def test_a_step_reads_no_value(tiny_policy, monkeypatch):
    """As on CUDA, where the checks that read values are off."""
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    constraints = Constraints(0, 1, 7, logit_bias=torch.zeros(13))
    made = static_engine(tiny_policy(), constraints, [[1, 2], [3, 4, 5]], 4, batch_size=7)
    with torch.no_grad(), made.policy.merged():
        made._admit()
        with HostReads() as reads:
            for _ in range(9):
                made.steps(made.running)
    assert reads.found == [] and bool(made.slots.finished.all())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - EXPLICIT))
def test_a_step_runs_on_tensors_without_values(family, monkeypatch):
    """Meta tensors have none to read, and no CPU tensor may take part."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)  # it knows no meta device
    policy = make_policy(family, torch.float32)
    policy.model.to("meta")
    output = policy.model.get_output_embeddings()
    policy.head = replace(policy.head, weight=output.weight, bias=getattr(output, "bias", None))
    constraints = Constraints(0, 1, 7, logit_bias=torch.zeros(VOCAB))
    drawer = Drawer(policy, constraints, SamplingOptions(), 4)
    slots = Slots.empty(4, 12, 7, 50, torch.zeros(1, 32, device="meta"))
    with torch.no_grad():
        step = step_of(policy, drawer, KeyValues(100))
        with HostReads() as reads:
            step(slots)
    assert reads.found == []


def test_which_policies_have_a_static_step():
    for family in FAMILIES:
        assert make_policy(family).has_static_step == (family not in EXPLICIT)


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.index_put_((x > 0,), torch.ones(1)),
    "nonzero": lambda x: x.nonzero(),
    "select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "repeat": lambda x: x.repeat_interleave(torch.tensor([2, 0, 1])),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_noted(name):
    with HostReads() as reads:
        READS[name](torch.arange(3.0))
    assert reads.found
    with HostReads() as reads:
        x = torch.arange(3.0)
        x[torch.tensor([0, 2])] += 1
        x.masked_fill_(x > 1, 0.0).sum()
    assert reads.found == []


def test_poll_every_below_one_is_refused(tiny_policy):
    with pytest.raises(InputError, match="StaticEngine: poll_every must be >= 1, got 0; raise it"):
        static_engine(tiny_policy(), Constraints(0), [[1]], 2, batch_size=2, poll_every=0)


def test_every_bucket_warms_up_and_is_captured_once(tiny_policy, monkeypatch):
    """The order of it, with stand-ins for the graphs: a capture runs nothing, replays of it run the step."""
    done = []

    def run(steps, slots, what):
        done.append((what, len(slots)))
        steps.step(slots)

    def captured(steps, slots):
        done.append(("capture", len(slots)))
        return SimpleNamespace(replay=lambda: run(steps, slots, "replay"))

    monkeypatch.setattr(static.Steps, "_warm_up", lambda self, slots: run(self, slots, "warm up"))
    monkeypatch.setattr(static.Steps, "_captured", captured)
    monkeypatch.setattr(static, "LEAST_MOVED", 1)
    bias = torch.zeros(13).index_fill_(0, torch.tensor([0]), 0.7)
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1], [4, 5]]
    setting = tiny_policy(), Constraints(0, max_length=20, logit_bias=bias), prompts, 10
    plain, graphs = (static_engine(*setting, 60, poll_every=1) for _ in range(2))
    graphs.steps.uses_graphs = True
    with torch.no_grad():
        want, got = plain.run(), graphs.run()
    assert got.sequences() == want.sequences() and torch.equal(got.log_pf, want.log_pf)
    sizes = list(dict.fromkeys(size for _, size in done))
    assert len(sizes) == graphs.num_moves + 1 >= 3
    for size in sizes:
        assert [what for what, s in done if s == size][:3] == ["warm up", "capture", "replay"]
    assert [what for what, _ in done].count("capture") == len(sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [5, 16, None])
def test_replayed_steps_draw_as_the_other_engine(monkeypatch, batch_size):
    """Through refills, moves and several buckets; a graph is captured once for each."""
    policy = random_policy("tiny", device="cuda")
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6]]
    bias = torch.zeros(512).index_fill_(0, torch.tensor([0]), 4.0)
    options = dict(policy=policy, constraints=Constraints(0, 1, 40, logit_bias=bias), num_samples=16)
    made, captured = [], []

    class Kept(static.StaticEngine):
        def __init__(self, *args):
            super().__init__(*args, poll_every=4)
            made.append(self)

    capture = static.Steps._captured
    monkeypatch.setattr(static.Steps, "_captured", lambda *args: captured.append(args) or capture(*args))
    monkeypatch.setattr(sampling, "choose_engine", lambda *args: Kept)
    got = sample(prompts, batch_size=batch_size, **options)
    sizes = [len(slots) for _, slots in captured]
    assert len(sizes) == len(set(sizes)) >= 1 and (batch_size is not None or made[0].num_moves)
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
    graphs, plain = (static_engine(policy, constraints, [[1, 2], [3, 4, 5]], 8, 16) for _ in range(2))
    plain.steps.uses_graphs = False
    with policy.merged():
        for one in (graphs, plain):
            one._admit()
            for _ in range(2):
                one.steps(one.running)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for one in (graphs, plain):
                for _ in range(8):
                    one.steps(one.running)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs.steps.graphs[16] is not None and not plain.steps.graphs
    for name in ("tokens", "lengths", "finished", "log_pf", "log_behavior", "hidden"):
        assert torch.equal(getattr(graphs.slots, name), getattr(plain.slots, name)), name
