"""Gradient checkpointing: the same gradients from less saved memory, in eval()."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastgfn.checks import InputError
from fastgfn.models.checkpointing import checkpoint_layers
from fastgfn.ops.silu_mul import silu_mul
from fastgfn.packing import pack
from fastgfn.passes import add_gradients
from fastgfn.rewards import LMReward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints, Rollouts


def _tree():
    sequences = [[5, 6, 7, 8], [5, 6, 9, 1], [2, 3, 4, 5]]
    constraints = Constraints(0, min_length=1, max_length=4)
    lengths, zeros = torch.full((3,), 4), torch.zeros(3)
    prompts = (torch.tensor([1, 2, 3]),)
    return pack(Rollouts(prompts, zeros.long(), torch.tensor(sequences), lengths, zeros, constraints))


def _run(policy, tree):
    """Bytes of what one pass saves for backward, weights not among them, then its results and gradients."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    saved, kept = {}, []

    def pack_saved(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_saved, lambda t: t):
        log_probs = score(tree, policy=policy)
    mix = torch.linspace(0.5, 2.0, tree.num_nodes, dtype=log_probs.log_pf.dtype)
    (mix @ log_probs.log_pf + mix.flip(0) @ log_probs.log_pterm).backward()
    grads = [p.grad for _, p in policy.parameters()]
    for _, p in policy.parameters():
        p.grad = None
    return sum(saved.values()), [log_probs.log_pf.detach(), log_probs.log_pterm.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_bits_from_less_saved_memory(tiny_policy, family, dtype):
    policy, tree = tiny_policy(dtype=dtype, family=family), _tree()
    before, want = _run(policy, tree)
    policy.gradient_checkpointing = True
    assert policy.gradient_checkpointing and not policy.model.training
    during, got = _run(policy, tree)
    policy.gradient_checkpointing = False
    after, again = _run(policy, tree)
    assert after == before and during < before / 4
    for a, b, c in zip(want, got, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(g.abs().max() > 0 for g in want)


def test_nothing_of_a_layer_is_alive_between_the_passes(tiny_policy, monkeypatch):
    """A hook of the gated MLP would hide its projections from the checkpoint, and keep them."""
    policy, inner = tiny_policy(), []

    def remember(gate, up):
        inner.extend(StorageWeakRef(x.untyped_storage()) for x in (gate, up))
        return silu_mul(gate, up)

    monkeypatch.setattr("fastgfn.models.mlp.silu_mul", remember)
    for enabled in (False, True):
        policy.gradient_checkpointing = enabled
        inner.clear()
        log_probs = score(_tree(), policy=policy)
        gc.collect()
        assert len(inner) == 4 and all(ref.expired() == enabled for ref in inner)
        log_probs.log_pf.sum().backward()
        assert len(inner) == 8, "every layer, or every product, is made again once"


def test_sampling_reward_and_plain_forwards_do_not_change(tiny_policy):
    policy, tree = tiny_policy(dtype=torch.float32), _tree()

    def results():
        drawn = sample([[1, 2, 3]], policy=policy, constraints=tree.constraints, num_samples=5, seed=3)
        with policy.plain() as model:
            assert not any("forward" in module.__dict__ for module in model.modules())
            logits = model(input_ids=tree.tokens[None]).logits
        return [drawn.tokens, drawn.lengths, LMReward(policy.reference)(tree), logits.detach()]

    want = results()
    policy.gradient_checkpointing = True
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))
    assert _run(policy, tree)[0] < _run(tiny_policy(dtype=torch.float32), tree)[0] / 4


def test_with_parts_and_a_shared_head_pass(tiny_policy):
    policy, tree = tiny_policy(), _tree()
    reward, results = LMReward(policy.reference), []
    for enabled in (False, True):
        policy.gradient_checkpointing = enabled
        add_gradients(tree, policy=policy, reward=reward, max_tokens=8)
        results.append([p.grad for _, p in policy.parameters()])
        for _, p in policy.parameters():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_forward_of_an_instance_is_put_back(tiny_policy):
    policy = tiny_policy()
    layer, other = policy._backbone.layers
    own = layer.forward
    del other.forward
    policy.gradient_checkpointing = True
    policy.gradient_checkpointing = True
    assert layer.forward is not own
    policy.gradient_checkpointing = False
    assert layer.forward is own and "forward" not in other.__dict__


def test_a_model_without_layers_is_refused():
    checkpoint_layers(nn.Linear(2, 2), False)
    with pytest.raises(InputError, match="model must be of a class with checkpointable layers, got Linear"):
        checkpoint_layers(nn.Linear(2, 2), True)
