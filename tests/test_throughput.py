import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgfn import checks
from fastgfn.baselines import plain_step
from fastgfn.models import random_policy
from fastgfn.objectives import modified_subtb_loss
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, log_reward
from fastgfn.rollout import sampling, static
from fastgfn.scoring import score
from fastgfn.throughput import Work, Workload, joined, machine_limits, measure, tree_work
from fastgfn.types import Constraints, Rollouts

SMALL = Workload(prompts=2, num_samples=3, prompt_tokens=7, output_tokens=5, rounds=2)


@pytest.fixture(scope="module")
def policy():
    return random_policy("tiny", lora_rank=4)


def make_rollouts(sequences, prompts, group, constraints):
    return Rollouts(
        tuple(torch.tensor(p) for p in prompts),
        torch.tensor(group),
        torch.tensor(sequences),
        torch.full((len(sequences),), len(sequences[0])),
        torch.zeros(len(sequences)),
        constraints,
    )


def test_report(policy):
    report = measure(policy, SMALL, compare="hf")
    assert json.loads(json.dumps(report)) == report
    ours, theirs = report["providers"]["fastgfn"], report["providers"]["hf"]
    shared = {"decode", "score", "reward", "loss", "backward", "optimizer", "other"}
    assert theirs["phases"].keys() == shared
    assert ours["phases"].keys() == shared | {"prefill", "draw", "head", "pack"}
    assert theirs["drawn_tokens"] == 2 * 3 * 5 and 20 <= ours["drawn_tokens"] <= 30
    for provider in (ours, theirs):
        phases = provider["phases"].values()
        assert provider["peak_bytes"] == max(p["peak_bytes"] for p in phases) > 0
        # the phases are those of another step, on a machine that may be busy
        assert 0.1 < sum(p["ms"] for p in phases) / provider["step_ms"] < 10
        rate = 1e3 * provider["drawn_tokens"] / provider["step_ms"]
        assert 0.3 < provider["tokens_per_s"] / rate < 3
    assert all(0 < ours["phases"][p]["of_limit"] < 2 for p in ("prefill", "decode", "score", "head"))
    assert ours["phases"]["prefill"]["tokens"] == 2 * 7
    assert ours["phases"]["loss"]["of_limit"] is None and theirs["phases"]["score"]["of_limit"] is None


def test_a_draw_within_the_step_counts_as_decoding(policy, monkeypatch):
    """As on a GPU, where one graph holds both."""
    work = {"decode": Work(3, 5.0, 7.0), "draw": Work(4, 11.0, 13.0), "score": Work(1, 2.0, 3.0)}
    assert joined(work, {"decode", "draw"}) is work
    assert joined(work, {"decode"}) == work | {"decode": Work(3, 16.0, 20.0)}
    monkeypatch.setattr(sampling, "choose_engine", lambda *args: static.StaticEngine)
    phases = measure(policy, SMALL)["providers"]["fastgfn"]["phases"]
    assert "draw" not in phases and phases["decode"]["tokens"] and phases["decode"]["of_limit"] > 0


def test_flops_are_those_of_the_models_products(policy):
    constraints = Constraints(9, max_length=6)
    tree = pack(make_rollouts([[3, 4, 5, 6, 7, 8]], [[1, 2]], [0], constraints))
    work = tree_work(policy, tree)
    with FlopCounterMode(display=False) as counter, policy.plain() as model, model.disable_adapter():
        model.set_attn_implementation("eager")
        model(input_ids=tree.tokens[None], use_cache=False)
    modules = counter.get_flop_counts()
    counts = modules["Global"]
    # some versions of transformers multiply for the rotary angles
    angles = sum(sum(v.values()) for name, v in modules.items() if name.endswith("rotary_emb"))
    products = sum(counts.values()) - counts[torch.ops.aten.bmm]
    attention = counts[torch.ops.aten.bmm] - angles
    size = tree.num_nodes
    # the counter takes attention as dense, here a node sees itself and what is above it
    causal = attention * (size + 1) / (2 * size)
    assert work["reward"].flop == products - 2 * policy.head.weight.numel() * size + causal
    adapter = sum(p.numel() for _, p in policy.parameters())
    assert work["score"].flop - work["reward"].flop == 2 * adapter * size
    assert work["prefill"].tokens + work["decode"].tokens == size - 1
    assert work["head"].tokens == 7


def test_shared_prefixes_are_work_once(policy):
    constraints = Constraints(9, max_length=3)
    tree = pack(make_rollouts([[3, 4, 5], [3, 4, 6], [3, 4, 5]], [[1, 2]], [0, 0, 0], constraints))
    work = tree_work(policy, tree)
    assert (work["prefill"].tokens, work["decode"].tokens, work["score"].tokens) == (2, 2, 6)
    # three draws: after the prompt, 3 and 3 4
    assert work["draw"].tokens == 3
    assert work["decode"].num_bytes > 2 * 4 * policy.num_linear_weights


def test_plain_step_has_the_loss_of_the_library(policy, monkeypatch):
    constraints = Constraints(9, max_length=4)
    prompts, sequences = [[1, 2], [3, 4]], [[5, 6, 7, 8], [5, 6, 1, 1], [2, 2, 2, 2], [8, 7, 6, 5]]
    for name, p in policy.parameters():
        p.grad = None
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tree = pack(make_rollouts(sequences, prompts, [0, 0, 1, 1], constraints))
    log_r = log_reward(tree, reward=LMReward(policy.reference))
    loss = modified_subtb_loss(score(tree, policy=policy), tree=tree, log_reward=log_r)
    loss.loss.backward()
    want = [p.grad for _, p in policy.parameters()]
    rows = torch.tensor([[*prompts[i // 2], *s] for i, s in enumerate(sequences)])
    monkeypatch.setattr(type(policy.model), "generate", lambda *args, **options: rows)
    optimizer = torch.optim.SGD([p for _, p in policy.parameters()], lr=0.0)
    got = plain_step(policy, prompts, constraints, num_samples=2, optimizer=optimizer)
    assert got == pytest.approx(float(loss.loss.detach()), rel=1e-5)
    for a, (_, p) in zip(want, policy.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_plain_model_is_that_of_transformers_and_comes_back(policy):
    tokens = torch.arange(1, 9)
    before = policy.tree_hidden(tokens, torch.arange(8), torch.full((8,), 8, dtype=torch.int32))
    with policy.plain() as model:
        assert model.config._attn_implementation == "sdpa"
        assert not any("forward" in m.__dict__ for m in model.modules())
        plain = model(input_ids=tokens[None], output_hidden_states=True).hidden_states[-1][0]
    after = policy.tree_hidden(tokens, torch.arange(8), torch.full((8,), 8, dtype=torch.int32))
    assert torch.equal(before, after)
    assert torch.allclose(before, plain, atol=1e-5)


def test_machine_limits():
    limits = machine_limits(torch.device("cpu"), torch.float32)
    assert 1e-3 < limits["tflop_per_s"] < 1e3 and 0.1 < limits["gb_per_s"] < 1e5


def test_refusals(policy):
    with pytest.raises(checks.InputError, match="shape must be one of tiny, .*got 'huge'"):
        random_policy("huge")
    with pytest.raises(checks.InputError, match="compare must be 'hf' or None, got 'vllm'"):
        measure(policy, SMALL, compare="vllm")
    with pytest.raises(checks.InputError, match="rounds must be >= 1, got 0; raise it"):
        Workload(rounds=0)
    with pytest.raises(checks.InputError, match="prompts.0. must be at most 8192 - max_length"):
        measure(policy, Workload(prompt_tokens=9000))
