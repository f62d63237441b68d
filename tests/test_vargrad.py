"""VarGrad: against autograd through the variance of every prompt, in parts, and to an exact posterior."""

from itertools import product

import pytest
import torch
from family_models import path_to

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.objectives import trajectory_coefficients, vargrad_loss
from fastgfn.packing import pack, split_tree
from fastgfn.passes import add_gradients
from fastgfn.rewards import LMReward, SequenceReward, log_reward
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.train import Trainer
from fastgfn.types import Constraints, Rollouts

PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3], [7]]
# duplicates, shared prefixes, the longest and the shortest length, two equal prompts, a prompt with a single
# sequence, an order that is no involution of that of the leaves
SEQUENCES = [
    [6, 7, 8],
    [6, 7, 8],
    [6],
    [6, 7, 9, 1, 2],
    [5],
    [5, 5, 5, 5, 5],
    [2, 1],
    [2],
    [2, 1, 4],
    [2],
    [8],
]
GROUP = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
LONGEST = 8
LIMITS = [{}, {"min_length": 1}, {"min_length": 1, "termination": "own"}]


def _tree(sequences=SEQUENCES, group=GROUP, **limits):
    tokens = torch.zeros(len(sequences), 5, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    prompts = tuple(torch.tensor(p) for p in PROMPTS)
    lengths = torch.tensor([len(s) for s in sequences])
    zeros, constraints = torch.zeros(len(sequences)), Constraints(0, **({"max_length": 5} | limits))
    return pack(Rollouts(prompts, torch.tensor(group), tokens, lengths, zeros, constraints))


def _value(z):
    return 0.3 * len(z) - sum((i + 1) * t % 5 for i, t in enumerate(z)) / 4


def _terminal(seen=None):
    def function(zs):
        if seen is not None:
            seen.extend(map(tuple, zs))
        return [_value(z) for z in zs]

    return SequenceReward(function, terminal_only=True)


def _grads(policy):
    grads = [p.grad for _, p in policy.parameters()]
    for _, p in policy.parameters():
        p.grad = None
    return grads


def _flat(grads):
    return torch.cat([g.double().flatten() for g in grads])


def _deltas(tree, policy, values):
    """log q(x) - log R(x) of every sequence, from sums along its path."""
    scored, found = score(tree, policy=policy), []
    for leaf, value in zip(tree.leaf.tolist(), values, strict=True):
        found.append(scored.log_pf[path_to(tree, leaf)].sum() + scored.log_pterm[leaf] - value)
    return torch.stack(found)


@pytest.mark.parametrize("limits", LIMITS, ids=["free", "forced", "own"])
@pytest.mark.parametrize("normalization", ["group", "batch", "trajectory"])
def test_value_and_gradient_are_those_of_the_variance(tiny_policy, limits, normalization):
    """The mean is detached in the loss and is not here: the gradients are equal all the same."""
    policy, tree = tiny_policy(family="gpt2"), _tree(**limits)
    delta = _deltas(tree, policy, [_value(s) for s in SEQUENCES])
    own = [delta[torch.tensor(GROUP) == g] for g in range(4)]
    per_group = [d.var(unbiased=False) for d in own]
    sizes = [len(d) for d in own]
    for d, biased in zip(own[:3], per_group, strict=False):
        torch.testing.assert_close(biased * len(d) / (len(d) - 1), d.var())
    if normalization == "group":
        want = torch.stack(per_group).mean()
    else:
        want = sum(n * v for n, v in zip(sizes, per_group, strict=True)) / sum(sizes)
    want.backward()
    want_grads = _grads(policy)
    rewards = log_reward(tree, reward=_terminal())
    got = vargrad_loss(score(tree, policy=policy), tree=tree, log_reward=rewards, normalization=normalization)
    got.loss.backward()
    assert float(want.detach()) > 0.1 and relative_error(got.loss, want) <= 1e-10
    torch.testing.assert_close(got.log_z, -torch.stack([d.detach().mean() for d in own]))
    for a, b in zip(_grads(policy), want_grads, strict=True):
        assert float(b.abs().max()) > 0 and relative_error(a, b) <= 1e-10


def test_weights_and_a_known_log_z(tiny_policy):
    policy, tree = tiny_policy(family="gpt2"), _tree()
    delta = _deltas(tree, policy, [_value(s) for s in SEQUENCES]).detach()
    weights, log_z = torch.linspace(0.5, 2.0, len(SEQUENCES)), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    log_z.requires_grad_()
    scored, rewards = score(tree, policy=policy), log_reward(tree, reward=_terminal())
    got = vargrad_loss(scored, tree=tree, log_reward=rewards, weights=weights, log_z=log_z)
    share = torch.tensor([1 / GROUP.count(g) / 4 for g in GROUP]).double() * weights
    residual = delta + log_z.detach()[GROUP]
    torch.testing.assert_close(got.loss.detach(), (share * residual.square()).sum())
    got.loss.backward()
    want = torch.zeros(4).double().index_add(0, torch.tensor(GROUP), 2 * share * residual)
    torch.testing.assert_close(log_z.grad, want)
    assert float(_grads(policy)[0].abs().max()) > 0
    coefficients = trajectory_coefficients(tree, weights=weights)
    torch.testing.assert_close(coefficients, share)


def test_it_vanishes_at_the_posterior(tiny_policy):
    policy, tree = tiny_policy(family="gpt2"), _tree()
    log_q = _deltas(tree, policy, [0.0] * len(SEQUENCES)).detach()
    rewards = torch.zeros(tree.num_nodes, dtype=torch.float64).index_copy(0, tree.leaf, log_q + 2.5)
    got = vargrad_loss(score(tree, policy=policy), tree=tree, log_reward=rewards)
    got.loss.backward()
    assert float(got.loss) <= 1e-24
    assert max(float(g.abs().max()) for g in _grads(policy)) <= 1e-11
    torch.testing.assert_close(got.log_z, torch.full((4,), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("normalization", ["group", "batch"])
@pytest.mark.parametrize("kind", ["lm", "function"])
@pytest.mark.parametrize("limits", LIMITS, ids=["free", "forced", "own"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_parts_give_what_one_pass_gives(tiny_policy, normalization, kind, limits, dtype, bound):
    family, scale = ("gpt2", 6.0) if dtype == torch.float64 else ("llama", 2.0)
    policy = tiny_policy(dtype=dtype, family=family, scale=scale)
    tree = _tree(**limits)
    reward = LMReward(policy.reference) if kind == "lm" else _terminal()
    raw = log_reward(tree, reward=reward)
    scored = score(tree, policy=policy)
    want = vargrad_loss(scored, tree=tree, log_reward=raw / 0.8, normalization=normalization)
    want.loss.backward()
    want_grads = _grads(policy)
    assert all(float(g.abs().max()) > 0 for g in want_grads)
    options = dict(reward_temperature=0.8, objective="vargrad", normalization=normalization)
    for max_tokens in (LONGEST, 12, None):
        assert (len(split_tree(tree, max_tokens=max_tokens)) > 1) == (max_tokens is not None)
        got = add_gradients(tree, policy=policy, reward=reward, max_tokens=max_tokens, **options)
        rows = ((got.loss, want.loss), (got.log_z, want.log_z), (got.log_reward, raw[tree.leaf]))
        for a, b in rows:
            assert relative_error(a, b) <= bound
        assert relative_error(_flat(_grads(policy)), _flat(want_grads)) <= bound


def test_a_forward_without_gradient_is_spent_only_where_parts_share_a_prompt(tiny_policy, monkeypatch):
    policy, made = tiny_policy(), []
    forward = policy.tree_hidden

    def counted(*args):
        made.append(torch.is_grad_enabled())
        return forward(*args)

    monkeypatch.setattr(policy, "tree_hidden", counted)
    for tree, is_shared in (
        (_tree(), True),
        (_tree([[6] * 4, [6] * 5, [5], [5, 1, 1, 1, 1], [2]], [0, 0, 1, 1, 3]), False),
    ):
        made.clear()
        num_parts = len(split_tree(tree, max_tokens=LONGEST))
        add_gradients(tree, policy=policy, reward=_terminal(), objective="vargrad", max_tokens=LONGEST)
        assert num_parts >= 3 and made == [False] * (num_parts if is_shared else 0) + [True] * num_parts


def test_a_terminal_reward_is_asked_for_whole_sequences_alone():
    seen, tree = [], _tree()
    value = log_reward(tree, reward=_terminal(seen))
    want = {(g, tuple(s)) for g, s in zip(GROUP, SEQUENCES, strict=True)}
    assert sorted(seen) == sorted(s for _, s in want)
    torch.testing.assert_close(value[tree.leaf], torch.tensor([_value(s) for s in SEQUENCES]).double())

    def other(tree):
        return torch.full((tree.num_nodes,), torch.nan).index_fill(0, tree.leaf, 1.5)

    with pytest.raises(InputError, match="log R must be finite"):
        log_reward(tree, reward=other)
    other.terminal_only = True
    value = log_reward(tree, reward=other)
    assert value[tree.leaf].tolist() == [1.5] * len(SEQUENCES) and bool(value.isfinite().all())


@pytest.mark.parametrize("max_tokens", [None, 12])
@pytest.mark.parametrize("min_length", [0, 1])
def test_learns_a_known_posterior_from_whole_sequences(tiny_policy, min_length, max_tokens):
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8)
    constraints = Constraints(0, min_length=min_length, max_length=3)
    space = [list(z) for k in range(min_length, 4) for z in product(range(1, 4), repeat=k)]
    log_r = torch.tensor([0.5 * sum(z) - 1.5 * len(z) for z in space], dtype=torch.float64)
    target = log_r - log_r.logsumexp(0)

    def distance():
        log_q, _ = sequence_log_probs([1, 2], space, policy=policy, constraints=constraints)
        return divergence(log_q, target, 0.0)

    assert distance().tv > 0.25
    config = TrainConfig(
        objective="vargrad", steps=150, num_samples=48, replay_samples=4, replay_capacity=16, warmup_steps=2,
        learning_rate=2e-2, max_tokens=max_tokens,
    )  # fmt: skip
    reward = SequenceReward(lambda zs: [0.5 * sum(z) - 1.5 * len(z) for z in zs], terminal_only=True)
    trainer = Trainer(policy, prompts=[[1, 2]], reward=reward, constraints=constraints, config=config)
    for _ in range(config.steps):
        metrics = trainer.step()
    assert distance().tv <= 0.02 and distance().kl_target_to_model <= 1e-3
    assert metrics["log_z"] == pytest.approx(float(log_r.logsumexp(0)), abs=0.02)


def test_refuses_bad_input(tiny_policy):
    policy, tree = tiny_policy(), _tree()
    scored, rewards = score(tree, policy=policy), torch.zeros(tree.num_nodes)
    options = dict(tree=tree, log_reward=rewards)
    ones = torch.ones(len(SEQUENCES))
    for extra, match in (
        ({"normalization": "mean"}, "vargrad_loss: normalization must be one of"),
        ({"log_reward": torch.zeros(3)}, r"vargrad_loss: log_reward must be \(\d+,\), got \(3,\)"),
        ({"log_z": torch.zeros(3)}, r"vargrad_loss: log_z must be \(4,\), got \(3,\)"),
        ({"weights": torch.ones(3)}, r"trajectory_coefficients: weights must be \(11,\), got \(3,\)"),
        ({"coefficients": ones, "weights": ones}, "weights must be None beside coefficients"),
        ({"coefficients": torch.ones(3)}, r"coefficients must be \(11,\), got \(3,\)"),
    ):
        with pytest.raises(InputError, match=match):
            vargrad_loss(scored, **(options | extra))
    with pytest.raises(InputError, match="objective must be one of .*'vargrad'.*, got 'ppo'"):
        add_gradients(tree, policy=policy, reward=_terminal(), objective="ppo")
    with pytest.raises(InputError, match="terminal-only reward; use objective='vargrad'"):
        add_gradients(tree, policy=policy, reward=_terminal(), objective="modified_subtb")
    assert all(p.grad is None for _, p in policy.parameters())
