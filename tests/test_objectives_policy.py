"""Every objective through a policy: at its own fixed point, in parts, weighted, and what it refuses."""

import pytest
import torch
from objective_cases import GROUP, SEQUENCES, make_tree, paths, random_values

from fastgfn.checks import InputError
from fastgfn.models.flow import FlowHead
from fastgfn.objectives import REGISTRY, interpolated_subtb_loss, trajectory_balance_loss
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack, split_tree
from fastgfn.passes import add_gradients, estimate_log_z
from fastgfn.rewards import LMReward, SequenceReward, log_reward
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.types import Constraints, LogProbs, Rollouts

LOG_Z = 2.5
LONGEST = 8
# every prefix has a reward of its own
DENSE = {"rooted_prefix_tb": dict(missing_reward=99.0, k_min=1)}


def _value(z):
    return 0.3 * len(z) - sum((i + 1) * t % 5 for i, t in enumerate(z)) / 4


def _reward(**options):
    return SequenceReward(lambda zs: [_value(z) for z in zs], **options)


@pytest.fixture
def policy(tiny_policy):
    """With a flow head whose values differ between states."""
    policy = tiny_policy(family="gpt2")
    policy.flow_head = FlowHead(policy)
    with torch.no_grad():
        policy.flow_head.offset.fill_(0.7)
        policy.flow_head.outer_weight.copy_(torch.linspace(-1, 1, len(policy.flow_head.outer_weight)))
    return policy


def _grads(policy, *more):
    tensors = [p for _, p in policy.parameters()] + list(policy.flow_head.parameters()) + list(more)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
    for p in tensors:
        p.grad = None
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("min_length", [0, 1])
@pytest.mark.parametrize("name", [n for n in REGISTRY if n != "interpolated_subtb"])
def test_no_loss_and_no_gradient_at_its_own_fixed_point(policy, name, min_length):
    """log R is set from q such that the objective's stated fixed point holds."""
    tree, spec = make_tree(min_length=min_length), REGISTRY[name]
    scored, prior = score(tree, policy=policy), score(tree, policy=policy.reference)
    log_q, log_p = (
        (tree_cumsum(x.log_pf, tree.parent) + x.log_pterm).detach() for x in (scored, prior)
    )  # fmt: skip
    log_r, options = log_q + LOG_Z, dict(DENSE.get(name, {}))
    if name == "rtb":
        options["beta"], log_r = 1.7, (log_q - log_p + LOG_Z) / 1.7
    if name == "length_normalized_tb":
        options["beta"], log_r = 1.7, ((log_q - log_p) / (tree.length + 1) + LOG_Z) / 1.7
    if spec.reads_prior:
        options["prior"] = prior
    if spec.reads_flow:
        options["log_flow"] = tree_cumsum(scored.log_pf, tree.parent).detach() + LOG_Z
    learned = torch.full((tree.num_groups,), LOG_Z, dtype=torch.float64)
    for log_z in (None, learned):
        if spec.reads_log_z(tree) and not (name == "tb" and log_z is None):
            options["log_z"] = log_z
        elif name == "tb":
            continue
        log_r = log_r.masked_fill(~tree.terminable, 0.0)
        got = spec.loss(scored, tree=tree, log_reward=log_r, **options)
        got.loss.backward(retain_graph=True)
        assert float(got.loss) <= 1e-20 and float(_grads(policy).abs().max()) <= 1e-10
        torch.testing.assert_close(got.log_z, learned)


def test_the_fixed_point_of_interpolated_rewards():
    """q(stop) follows the interpolated rewards of a single trajectory, not the true ones."""
    tree = make_tree([[5, 5, 5, 5, 5]], [0])
    random, log_r, _, _ = random_values(tree)
    (path,), value = paths(tree), log_r.clone()
    for k in (1, 3):
        value[path[k]] = (log_r[path[k - 1]] + log_r[path[k + 1]]) / 2
    reached = tree_cumsum(random.log_pf, tree.parent).detach()
    log_pterm = (value - reached).masked_fill(~tree.terminable, 0.0).requires_grad_()
    scored, options = LogProbs(random.log_pf, log_pterm), dict(tree=tree, log_reward=log_r)
    got = interpolated_subtb_loss(scored, segment=2, **options).loss
    grads = torch.autograd.grad(got, (random.log_pf, log_pterm))
    assert float(got) <= 1e-20 and all(float(g.abs().max()) <= 1e-10 for g in grads)
    assert float(interpolated_subtb_loss(scored, segment=1, **options).loss) > 1e-2


@pytest.mark.parametrize("name", REGISTRY)
def test_parts_give_what_one_pass_gives(policy, name):
    tree, spec = make_tree(min_length=1), REGISTRY[name]
    weights = torch.linspace(0.5, 2.0, len(SEQUENCES)).double()
    table = torch.linspace(1.0, 2.0, tree.num_groups).double().requires_grad_()
    options = dict(DENSE.get(name, {}), residual_loss="huber" if name == "modified_db" else "squared")
    common = dict(policy=policy, reward=_reward(), reward_temperature=0.8, objective=name, weights=weights)
    raw = log_reward(tree, reward=_reward())
    prior = {"prior": score(tree, policy=policy.reference)} if spec.reads_prior else {}
    for kind in ("estimate", "table", "head"):
        if name == "tb" and kind == "estimate":
            continue
        scored = score(tree, policy=policy)
        of = {"estimate": None, "table": table * 2, "head": scored.log_flow[tree.is_root_state]}[kind]
        given = {"log_z": of} if spec.reads_log_z(tree) else {}
        want = spec.loss(
            scored, tree=tree, log_reward=raw / 0.8, weights=weights, **given, **prior, **options
        )
        want.loss.backward()
        want_grads = _grads(policy, table)
        for max_tokens in (LONGEST, None) if kind == "estimate" else (12,):
            assert (len(split_tree(tree, max_tokens=max_tokens)) > 1) == (max_tokens is not None)
            log_z = {"estimate": None, "table": table * 2, "head": "head"}[kind]
            got = add_gradients(tree, log_z=log_z, max_tokens=max_tokens, **common, **options)
            pairs = (got.loss, want.loss), (got.log_z, want.log_z), (got.log_ratio, want.log_ratio)
            for a, b in (*pairs, (_grads(policy, table), want_grads)):
                assert relative_error(a, b.detach()) <= 1e-10
            assert (got.known_log_z is None) == (kind == "estimate")
            if kind != "estimate":
                torch.testing.assert_close(got.known_log_z, of.detach())
        common_estimate = {k: v for k, v in common.items() if k != "weights"}
        torch.testing.assert_close(
            estimate_log_z(tree, max_tokens=12, **common_estimate, **options), want.log_z
        )


def test_importance_weights_are_those_of_the_score(policy):
    tree = make_tree()
    common = dict(policy=policy, reward=_reward(), objective="vargrad")
    log_q = add_gradients(tree, **common).log_q
    shift = torch.linspace(-1.0, 1.5, len(SEQUENCES)).double()
    log_behavior = log_q - shift
    log_behavior[3] = torch.nan
    weights = shift.exp().clamp(0.5, 2.0).index_fill(0, torch.tensor([3]), 1.0)
    _grads(policy)
    want = add_gradients(tree, weights=weights, **common)
    want_grads = _grads(policy)
    options = dict(log_behavior=log_behavior, importance_clip=(0.5, 2.0), max_tokens=12)
    got = add_gradients(tree, **options, **common)
    assert relative_error(got.loss, want.loss) <= 1e-10 and relative_error(got.log_q, log_q) <= 1e-10
    assert relative_error(_grads(policy), want_grads) <= 1e-10


def test_the_prior_shares_its_forward_with_the_reward(policy, seen_tokens):
    tree = make_tree(min_length=1)
    base = score(tree, policy=policy.reference)
    reward = LMReward(policy.reference, logit_bias=torch.linspace(0, 1, 13).double())
    raw = log_reward(tree, reward=reward)
    want = REGISTRY["rtb"].loss(score(tree, policy=policy), tree=tree, log_reward=raw, prior=base)
    want.loss.backward()
    want_grads = _grads(policy)
    seen_tokens.clear()
    got = add_gradients(tree, policy=policy, reward=reward, objective="rtb")
    assert len(seen_tokens) == 2
    assert relative_error(got.loss, want.loss.detach()) <= 1e-10
    assert relative_error(_grads(policy), want_grads) <= 1e-10


def test_rewards_of_whole_sequences(policy):
    tree, reward = make_tree(), _reward(terminal_only=True)
    for name, spec in REGISTRY.items():
        log_z = torch.zeros(tree.num_groups) if name == "tb" else None
        options = dict(policy=policy, reward=reward, objective=name, log_z=log_z)
        if spec.reads_prefixes:
            with pytest.raises(InputError, match="terminal-only reward; use objective='vargrad'"):
                add_gradients(tree, **options)
        else:
            got = add_gradients(tree, **options)
            dense = add_gradients(tree, **(options | {"reward": _reward()}))
            assert torch.equal(got.loss, dense.loss) and float(got.loss) > 0.1


def test_a_clamped_residual_has_no_gradient_beyond_its_limit(policy):
    tree = make_tree()
    far = torch.full((tree.num_groups,), 50.0).double()
    options = dict(policy=policy, reward=_reward(), objective="tb", log_z=far, residual_loss="clamped")
    got = add_gradients(tree, residual_limit=5.0, **options)
    assert float(got.loss) == pytest.approx(25.0) and float(_grads(policy).abs().max()) == 0.0
    add_gradients(tree, residual_limit=100.0, **options)
    assert float(_grads(policy).abs().max()) > 1e-3


def test_refuses_bad_input(tiny_policy):
    policy, tree = tiny_policy(), make_tree()
    scored, rewards = score(tree, policy=policy), torch.zeros(tree.num_nodes)
    for name, spec in REGISTRY.items():
        options = dict(tree=tree, log_reward=rewards)
        if spec.reads_prior:
            options["prior"] = score(tree, policy=policy.reference)
        if spec.reads_flow:
            with pytest.raises(InputError, match=r"subtb_loss: log_flow must be given.*flow_head"):
                spec.loss(scored, **options)
            options["log_flow"] = rewards
        if name == "tb":
            with pytest.raises(InputError, match="log_z must be a tensor, got None; use vargrad_loss"):
                spec.loss(scored, log_z=None, **options)
            options["log_z"] = torch.zeros(4)
        for extra, match in (
            ({"residual_loss": "cube"}, "residual_loss must be one of .*, got 'cube'"),
            ({"residual_limit": 1.0}, "residual_limit must be None, got 1.0; it goes with"),
            ({"residual_loss": "clamped", "residual_limit": 0.0}, "residual_limit must be > 0"),
            ({"normalization": "mean"}, "normalization must be one of"),
            ({"log_reward": torch.zeros(3)}, r"log_reward must be \(\d+,\), got \(3,\)"),
            ({"weights": torch.ones(3)}, r"weights must be \(11,\), got \(3,\)"),
            ({"coefficients": torch.ones(3)}, r"coefficients must be \(11,\), got \(3,\)"),
            ({"coefficients": torch.ones(11), "weights": torch.ones(11)}, "weights must be None beside"),
        ):
            with pytest.raises(InputError, match=match):
                spec.loss(scored, **(options | extra))
    with pytest.raises(InputError, match=r"trajectory_balance_loss: log_z must be \(4,\), got \(3,\)"):
        trajectory_balance_loss(scored, tree=tree, log_reward=rewards, log_z=torch.zeros(3))
    options = dict(tree=tree, log_reward=rewards)
    with pytest.raises(InputError, match="relative_trajectory_balance_loss: prior must be given"):
        REGISTRY["rtb"].loss(scored, prior=None, **options)
    for name in ("rtb", "length_normalized_tb"):
        with pytest.raises(InputError, match="beta must be > 0, got 0.0; 1 keeps log_reward as it is"):
            REGISTRY[name].loss(scored, prior=scored, beta=0.0, **options)
    for behavior in (None, torch.zeros(3)):
        with pytest.raises(
            InputError, match="add_gradients: log_behavior must be .*; pass the rollouts' own"
        ):
            add_gradients(
                tree, policy=policy, reward=_reward(), importance_clip=(0.5, 2.0), log_behavior=behavior
            )
    for options in (dict(objective="tb", log_z="head"), dict(objective="subtb")):
        with pytest.raises(InputError, match="(flow_head|log_flow) must be .*flow"):
            add_gradients(tree, policy=policy, reward=_reward(), **options)
    assert GROUP[0] == 0 and all(p.grad is None for _, p in policy.parameters())


def test_states_whose_hidden_states_are_equal_have_flows_of_their_own(tiny_policy):
    """A token that repeats from the very start, under rotary positions."""
    policy = tiny_policy()
    policy.flow_head = FlowHead(policy)
    with torch.no_grad():
        policy.flow_head.offset.fill_(0.7)
        policy.flow_head.outer_weight.copy_(torch.linspace(-1, 1, len(policy.flow_head.outer_weight)))
    prompt, zeros = torch.tensor([7]), torch.zeros(1)
    group = torch.zeros(1, dtype=torch.int64)
    drawn = Rollouts((prompt,), group, torch.tensor([[7, 7]]), torch.tensor([2]), zeros, Constraints(0))
    tree = pack(drawn)
    hidden = policy.tree_hidden(tree.tokens, tree.position, tree.end)
    assert torch.allclose(hidden[0], hidden[2], atol=1e-12)
    flow = score(tree, policy=policy).log_flow
    assert min(float((flow[a] - flow[b]).abs()) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
