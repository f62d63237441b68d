"""The step over slots: what it reads and what it writes."""

from dataclasses import replace

import pytest
import torch
from family_models import EXPLICIT, FAMILIES, VOCAB, make_policy
from rollout_cases import static_engine

from fastgfn.attention import KeyValues
from fastgfn.checks import InputError
from fastgfn.functional import values
from fastgfn.models.probe import HostReads
from fastgfn.rollout import SamplingOptions
from fastgfn.rollout import slots as module
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.slots import TILE_ROWS, Slots, most_tiles, step_of, tiles_of
from fastgfn.types import Constraints


def test_no_slot_writes_to_nodes_of_others(tiny_policy):
    """Keys and values of prompts and of finished slots stay, whatever the other slots do."""
    policy, constraints = tiny_policy(), Constraints(0, max_length=6)
    made = static_engine(policy, constraints, [[1, 2], [3, 4, 5]], 4, batch_size=8)
    with torch.no_grad():
        made._admit()
        layers = [x for pair in made.kv.layers.values() for x in pair]
        slots, num_own = made.workspace.slots, len(made.workspace.slots) * made.max_length
        for x in layers:
            x[:num_own] = 0
        before = [x.clone() for x in layers]
        for _ in range(4):
            own = slots.first + (slots.lengths - 1).clamp(min=0)
            kept = [x.clone() for x in layers]
            made.workspace.steps(slots)
            ran = slots.first + (slots.lengths - 1).clamp(min=0)
            for x, old in zip(layers, kept, strict=True):
                changed = (x[:num_own] != old[:num_own]).flatten(1).any(1).nonzero()[:, 0]
                assert set(changed.tolist()) <= {*ran.tolist(), *own.tolist()}
    prompts = (made.pool.holds > 0).index_fill(0, torch.arange(num_own), False)
    assert int(prompts.sum()) == 5
    for x, old in zip(layers, before, strict=True):
        assert torch.equal(x[prompts], old[prompts])


def test_a_step_reads_no_value(tiny_policy, monkeypatch):
    """As on CUDA, where the checks that read values are off."""
    monkeypatch.setattr(module, "LEAST_SHARED", 2)
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    constraints = Constraints(0, 1, 7, logit_bias=torch.zeros(13))
    made = static_engine(tiny_policy(), constraints, [[1, 2], [3, 4, 5]], 4, batch_size=7)
    with torch.no_grad(), made.policy.merged():
        made._admit()
        with HostReads() as reads:
            for _ in range(9):
                made.workspace.steps(made.running)
    assert reads.found == [] and bool(made.workspace.slots.finished.all())


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
    slots = Slots.empty(4, 12, 7, torch.zeros(1, 32, device="meta"))
    with torch.no_grad():
        seed = torch.zeros(1, dtype=torch.int64, device="meta")
        step = step_of(policy, drawer, KeyValues(100), seed, num_tiles=2)
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


def test_tiles():
    """Even ones, of prompts that are long enough and have two slots, in the order of the prompts."""
    prompt, depth = torch.full((2 * TILE_ROWS + 9,), 3), torch.full((2 * TILE_ROWS + 9,), 32)
    prompt[4], prompt[[5, 7]], prompt[[0, 8]], prompt[[1, 2]] = 0, 1, 2, -1
    depth[[5, 7]], depth[[0, 8]] = 31, 40
    tiles, shared = tiles_of(prompt, depth)
    want = depth.index_fill(0, torch.tensor([4, 5, 7, 1, 2]), 0)
    assert torch.equal(shared, want)
    rows = [[r for r in tile if r >= 0] for tile in tiles.tolist()]
    rest = (prompt == 3).nonzero()[:, 0].tolist()
    assert rows[:4] == [[0, 8], rest[:12], rest[12:23], rest[23:]] and not any(rows[4:])
    assert [tile[: len(own)] for tile, own in zip(tiles.tolist(), rows, strict=True)] == rows


@pytest.mark.parametrize("seed", range(20))
def test_no_slots_have_more_tiles_than_most_tiles(seed):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(1 + seed % 7, (150,), generator=generator)
    length = torch.randint(16, 64, (7,), generator=generator)
    count = group.bincount(minlength=7)
    for size in (1, 2, 5, 17, 40, 150):
        most = most_tiles(count, length, size)
        for _ in range(5):
            held = group[torch.randperm(150, generator=generator)[:size]]
            tiles, _ = tiles_of(held, length[held])
            assert int((tiles[:, 0] >= 0).sum()) <= most <= size // 2
