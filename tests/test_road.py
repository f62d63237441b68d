"""The road against the naive computation: one forward per sequence, every window in a double loop."""

import pytest
import torch

from fastgfn.objectives import modified_subtb_loss
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, SequenceReward, log_reward
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.types import Constraints, Rollouts

STOP = 0
PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3]]
# lengths 1 and max (5), an empty one, duplicates, shared prefixes, three prompts of which two are equal
SEQUENCES = [[6, 7, 8], [6], [6, 7, 8], [6, 7, 9, 1, 2], [5], [5, 5, 5, 5, 5], [2, 1], [2], [2, 1, 4], [2, 1]]
GROUP = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def _rollouts(constraints, sequences=SEQUENCES, group=GROUP, prompts=PROMPTS):
    tokens = torch.zeros(len(sequences), constraints.max_length, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    return Rollouts(
        tuple(torch.tensor(p) for p in prompts),
        torch.tensor(group),
        tokens,
        torch.tensor([len(s) for s in sequences]),
        torch.zeros(len(sequences)),
        constraints,
    )


def _sequence_terms(model, prompt, sequence, constraints):
    """log q of every token and log q(stop) of every prefix, (k,) and (k + 1,), from one plain forward."""
    ids = torch.tensor([prompt + sequence])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    if constraints.logit_bias is not None:
        logits = logits + constraints.logit_bias.to(logits)
    if constraints.termination == "forced":
        short = torch.arange(len(logits)) < constraints.min_length
        forbidden = torch.zeros(logits.shape[1], dtype=torch.bool)
        forbidden[STOP] = True
        logits = logits.masked_fill(short[:, None] & forbidden, -torch.inf)
    log_p = logits.log_softmax(-1)
    log_pterm = log_p[:, STOP]
    if constraints.termination == "forced" and len(sequence) == constraints.max_length:
        log_pterm = torch.cat([log_pterm[:-1], log_pterm.new_zeros(1)])
    return log_p[torch.arange(len(sequence)), sequence], log_pterm


def _naive_loss(model, rewards, constraints, lam, normalization, groups=GROUP):
    """rewards[n]: (k + 1,) log R of every prefix of sequence n."""
    first = constraints.min_length if constraints.termination == "forced" else 0
    terms = [
        _sequence_terms(model, PROMPTS[g], s, constraints) for s, g in zip(SEQUENCES, groups, strict=True)
    ]
    paths = [torch.cat([pf.new_zeros(1), pf.cumsum(0)]) for pf, _ in terms]
    log_z = {}
    for g in set(groups):
        gap = [
            float(rewards[n][-1] - paths[n][-1] - terms[n][1][-1])
            for n in range(len(groups))
            if groups[n] == g
        ]
        log_z[g] = sum(gap) / len(gap)
    num, den = [], []
    for n, (_, log_pterm) in enumerate(terms):
        u = [paths[n][k] + log_pterm[k] - rewards[n][k] for k in range(first, len(log_pterm))]
        if first > 0:
            u = [u[0].new_tensor(-log_z[groups[n]])] + u
        pairs = [(i, j) for j in range(len(u)) for i in range(j)]
        num.append(sum((lam ** (j - i - 1) * (u[j] - u[i]) ** 2 for i, j in pairs), paths[n].new_zeros(())))
        den.append(sum(lam ** (j - i - 1) for i, j in pairs))
    if normalization == "batch":
        return sum(num) / sum(den)
    if normalization == "trajectory":
        used = [n for n in range(len(num)) if den[n] > 0]
        return sum(num[n] / den[n] for n in used) / len(used)
    ratios = []
    for g in sorted(set(groups)):
        rows = [n for n in range(len(num)) if groups[n] == g]
        ratios.append(sum(num[n] for n in rows) / sum(den[n] for n in rows))
    return sum(ratios) / len(ratios)


def _both(tiny_policy, constraints, lam, normalization, dtype, lm_reward):
    family = "gpt2" if dtype == torch.float64 else "llama"
    fused = tiny_policy(dtype=dtype, family=family)
    naive = tiny_policy(dtype=dtype, family=family, implementation="sdpa")
    tree = pack(_rollouts(constraints))
    if lm_reward:
        reward = LMReward(fused.reference)
        with torch.no_grad(), naive.model.disable_adapter():
            own = Constraints(STOP, max_length=constraints.max_length, termination="own")
            rewards = []
            for s, g in zip(SEQUENCES, GROUP, strict=True):
                pf, pterm = _sequence_terms(naive.model, PROMPTS[g], s, own)
                rewards.append(torch.cat([pf.new_zeros(1), pf.cumsum(0)]) + pterm)
    else:

        def value(z):
            return 0.3 * len(z) - sum((i + 1) * t % 5 for i, t in enumerate(z)) / 4

        reward = SequenceReward(lambda zs: [value(z) for z in zs])
        rewards = [torch.tensor([value(s[:k]) for k in range(len(s) + 1)], dtype=dtype) for s in SEQUENCES]
    got = modified_subtb_loss(
        score(tree, policy=fused),
        tree=tree,
        log_reward=log_reward(tree, reward=reward) / 0.8,
        subtb_lambda=lam,
        normalization=normalization,
    ).loss
    want = _naive_loss(naive.model, [r / 0.8 for r in rewards], constraints, lam, normalization)
    got.backward()
    want.backward()
    grads = zip(fused.parameters(), naive.parameters(), strict=True)
    return got, want, [(name, p.grad, q.grad) for (name, p), (_, q) in grads]


# lambda grid of the paper and its neighbours; min_length 1 drops s_0 from the windows and anchors it
@pytest.mark.parametrize("lam", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("min_length", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_loss_and_lora_gradients_equal_the_naive_computation(tiny_policy, lam, min_length, dtype, bound):
    constraints = Constraints(STOP, min_length=min_length, max_length=5)
    got, want, grads = _both(tiny_policy, constraints, lam, "group", dtype, lm_reward=True)
    assert relative_error(got, want) <= bound
    assert len(grads) == 2 * 2 * (4 if dtype == torch.float64 else 7) and all(
        b.abs().max() > 0 for _, _, b in grads
    )
    for name, a, b in grads:
        assert relative_error(a, b) <= bound, name


@pytest.mark.parametrize("normalization", ["group", "batch", "trajectory"])
@pytest.mark.parametrize("termination", ["forced", "own"])
def test_conventions_and_normalizations_equal_the_naive_computation(tiny_policy, normalization, termination):
    bias = torch.where(torch.arange(13) == 12, -50.0, 0.0)
    constraints = Constraints(STOP, max_length=5, termination=termination, logit_bias=bias)
    got, want, grads = _both(tiny_policy, constraints, 0.9, normalization, torch.float64, lm_reward=False)
    assert relative_error(got, want) <= 1e-9
    for name, a, b in grads:
        assert relative_error(a, b) <= 1e-9, name


def test_tokens_before_the_first_terminable_prefix_get_a_gradient(tiny_policy):
    constraints = Constraints(STOP, min_length=3, max_length=5)
    sequences = [[6, 7, 8], [6, 7, 9, 1, 2], [5, 4, 3, 2]]
    tree = pack(_rollouts(constraints, sequences, [0, 0, 0], PROMPTS[:1]))
    log_probs = score(tree, policy=tiny_policy())
    log_probs.log_pf.retain_grad()
    reward = SequenceReward(lambda zs: [-1.7 * len(z) for z in zs])
    modified_subtb_loss(log_probs, tree=tree, log_reward=log_reward(tree, reward=reward)).loss.backward()
    early = (tree.length >= 1) & (tree.length <= 3)
    assert int(early.sum()) == 7
    assert bool((log_probs.log_pf.grad[early].abs() > 1e-6).all())


@pytest.mark.parametrize("min_length", [0, 2])
def test_the_loss_and_its_gradient_vanish_at_the_posterior(tiny_policy, min_length):
    """R := q makes every window residual zero, with and without the anchor."""
    constraints = Constraints(STOP, min_length=min_length, max_length=5)
    sequences = [s for s in SEQUENCES if len(s) >= min_length]
    group = [g for s, g in zip(SEQUENCES, GROUP, strict=True) if len(s) >= min_length]
    tree = pack(_rollouts(constraints, sequences, group))
    policy = tiny_policy()
    log_probs = score(tree, policy=policy)
    from fastgfn.ops.scan import tree_cumsum

    log_q = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm).detach()
    result = modified_subtb_loss(
        log_probs, tree=tree, log_reward=(log_q + 2.5).masked_fill(~tree.terminable, 0.0)
    )
    result.loss.backward()
    assert float(result.loss) <= 1e-24
    assert max(float(p.grad.abs().max()) for _, p in policy.parameters()) <= 1e-11
    torch.testing.assert_close(result.log_z, torch.full((3,), 2.5, dtype=torch.float64))


def test_importance_weights_scale_the_numerator_only(tiny_policy):
    constraints = Constraints(STOP, max_length=5)
    tree = pack(_rollouts(constraints))
    log_probs = score(tree, policy=tiny_policy())
    rewards = log_reward(tree, reward=SequenceReward(lambda zs: [-float(len(z)) for z in zs]))
    options = dict(tree=tree, log_reward=rewards, subtb_lambda=0.9)
    for normalization in ("group", "batch", "trajectory"):
        plain = modified_subtb_loss(log_probs, normalization=normalization, **options).loss
        ones = torch.ones(len(SEQUENCES))
        for scale in (1.0, 3.0):
            weighted = modified_subtb_loss(
                log_probs, normalization=normalization, weights=scale * ones, **options
            ).loss
            torch.testing.assert_close(weighted, scale * plain)
