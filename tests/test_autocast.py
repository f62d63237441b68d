"""torch.autocast around the road: what plain transformers computes in 16 bits, no further from float32."""

import pytest
import torch
from family_models import FAMILIES, make_model

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.models import Policy
from fastgfn.models.load import add_adapter
from fastgfn.ops.tree import path_nodes
from fastgfn.packing import pack
from fastgfn.passes import add_gradients
from fastgfn.rewards import LMReward, log_reward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.train import Trainer
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [4]]
CONSTRAINTS = Constraints(0, max_length=8)


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def adapted(family, implementation):
    torch.manual_seed(4)
    model = make_model(family, implementation, torch.float32, scale=2.0).requires_grad_(False)
    model = add_adapter(model, rank=2, alpha=2.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return model.eval()


def road(policy, enabled):
    """Rollouts, log q of the score at their tokens (N, L), log R, gradients."""
    with autocast(enabled):
        rollouts = sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=6, seed=3)
        tree = pack(rollouts)
        reward = LMReward(policy.reference)
        log_q = score(tree, policy=policy).log_pf.detach()
        log_r = log_reward(tree, reward=reward)
        found = add_gradients(tree, policy=policy, reward=reward)
    for _, p in policy.parameters():
        assert p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())
        p.grad = None
    assert (log_q.dtype, log_r.dtype) == (torch.float32, torch.float64) and bool(found.loss.isfinite())
    nodes = path_nodes(tree.parent, tree.leaf, rollouts.lengths, CONSTRAINTS.max_length)
    return rollouts, log_q[nodes.clamp(min=0)], tree


def plain_log_q(model, rollouts, enabled):
    found = torch.zeros_like(rollouts.log_pf)
    for n, sequence in enumerate(rollouts.sequences()):
        prompt = PROMPTS[int(rollouts.group[n])]
        with torch.no_grad(), autocast(enabled):
            logits = model(input_ids=torch.tensor([prompt + sequence]), use_cache=False).logits[0]
        log_p = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        found[n, : len(sequence)] = log_p[torch.arange(len(sequence)), torch.tensor(sequence).long()]
    return found


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama-tied", "gpt2-scaled")])
def test_the_score_is_as_near_to_float32_as_plain_transformers_and_to_the_sampler(family):
    policy, plain = Policy(adapted(family, "fastgfn")), adapted(family, "plain")
    rollouts, log_q, tree = road(policy, enabled=True)
    mask = rollouts.action_mask()
    assert int(mask.sum()) > 30
    single = plain_log_q(plain, rollouts, enabled=False)
    naive = float((plain_log_q(plain, rollouts, enabled=True) - single)[mask].abs().max())
    assert naive > 1e-3, "plain transformers does not round"
    for got, want, times in ((log_q, single, 2), (rollouts.log_pf, single, 2), (rollouts.log_pf, log_q, 3)):
        assert float((got - want)[mask].abs().max()) <= times * naive
    # and it did compute in 16 bits
    assert float((log_q - single)[mask].abs().max()) > 1e-4
    policy_again = score(tree, policy=policy).log_pf[
        path_nodes(tree.parent, tree.leaf, rollouts.lengths, CONSTRAINTS.max_length).clamp(min=0)
    ]
    torch.testing.assert_close(policy_again[mask], single[mask], rtol=1e-4, atol=1e-4)


def test_a_policy_made_under_autocast_counts_the_bytes_of_its_own_dtype():
    made = []
    for enabled in (True, False):
        with autocast(enabled):
            made.append(Policy(adapted("llama", "fastgfn")).node_bytes)
    assert made[0] == made[1] == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32


def test_checkpointed_layers_run_again_under_autocast():
    policy, grads = Policy(adapted("llama", "fastgfn")), []
    with autocast():
        tree = pack(sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=6, seed=3))
    for enabled in (False, True):
        policy.gradient_checkpointing = enabled
        with autocast():
            add_gradients(tree, policy=policy, reward=LMReward(policy.reference))
        grads.append([p.grad for _, p in policy.parameters()])
        for _, p in policy.parameters():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_copies_are_merged_and_precision_is_refused():
    policy = Policy(adapted("llama", "fastgfn"))
    options = dict(policy=policy, constraints=CONSTRAINTS, num_samples=2)
    config = TrainConfig(num_samples=2, rollout_precision="bfloat16", replay_duplicates="exact")
    reward = LMReward(policy.reference)
    trainer = Trainer(policy, prompts=PROMPTS, reward=reward, constraints=CONSTRAINTS, config=config)
    want = "sample: precision must be None under autocast, got torch.bfloat16; autocast says"
    with autocast():
        with pytest.raises(InputError, match=want):
            sample(PROMPTS, precision=torch.bfloat16, **options)
        with pytest.raises(InputError, match=want):
            trainer.step()
        merged = []
        policy.merged = lambda *args: merged.append(args)
        sample(PROMPTS, **options)
    assert not merged


def test_steps_within_one_autocast_see_the_weights_of_the_last():
    """autocast keeps the casts of trainable weights until it ends."""
    runs = []
    for num_blocks in (3, 1):
        policy = Policy(adapted("llama", "fastgfn"))
        config = TrainConfig(num_samples=4, replay_duplicates="exact", learning_rate=5e-2, warmup_steps=1)
        reward = LMReward(policy.reference)
        trainer = Trainer(policy, prompts=PROMPTS, reward=reward, constraints=CONSTRAINTS, config=config)
        metrics = []
        for _ in range(num_blocks):
            with autocast():
                metrics += [trainer.step() for _ in range(3 // num_blocks)]
        runs.append(metrics)
    assert runs[0] == runs[1] and len({m["loss"] for m in runs[0]}) == 3
