"""Every objective on the tree against its padded form: values and gradients."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from objective_cases import (
    GROUP,
    MAX_LENGTH,
    make_tree,
    padded_loss,
    paths,
    random_values,
    tool_tree,
    tree_loss,
)

from fastgfn.config import OBJECTIVES, RESIDUAL_LOSSES, TrainConfig
from fastgfn.objectives import (
    REGISTRY,
    detailed_balance_loss,
    modified_subtb_loss,
    subtb_loss,
    trajectory_balance_loss,
)
from fastgfn.ops.residual import LOSSES
from fastgfn.types import LogProbs, Role

# of each objective, the options that are not its defaults, under one name in both forms
OPTIONS = {
    "modified_subtb": dict(subtb_lambda=0.7),
    "subtb": dict(subtb_lambda=0.7),
    "rtb": dict(beta=1.7),
    "length_normalized_tb": dict(beta=1.7),
    "rooted_prefix_tb": dict(prefix_weight=0.6, k_min=1, gamma=0.9, missing_reward=0.4, tolerance=0.5),
    "interpolated_subtb": dict(segment=2, subtb_lambda=0.7),
}
TREES = {
    "free": make_tree,
    "anchor": lambda: make_tree(min_length=1),
    "own": lambda: make_tree(min_length=1, termination="own"),
}


def _both(
    name, tree, *, residual="squared", limit=None, normalization="group", weights=None, known=True, **more
):
    """(value, gradients in log_pf, log_pterm, log_flow and log_z) of the tree form and of the padded one."""
    options = OPTIONS.get(name, {}) | more
    group_ids = None
    has_log_z = known and name != "vargrad"
    if normalization == "group" or not has_log_z and name not in ("subtb", "db"):
        group_ids = tree.group[tree.leaf].long()
    found = []
    for form in ("tree", "padded"):
        log_probs, log_reward, log_z, prior = random_values(tree)
        args = name, tree, log_probs, log_reward, log_z if has_log_z else None, prior
        if form == "tree":
            chosen = dict(residual_loss=residual, residual_limit=limit, normalization=normalization)
            loss = tree_loss(*args, weights=weights, **chosen, **options).loss
        else:
            chosen = dict(loss=residual, residual_limit=limit, normalization=normalization)
            loss = padded_loss(*args, weights=weights, group_ids=group_ids, **chosen, **options)
        leaves = log_probs.log_pf, log_probs.log_pterm, log_probs.log_flow, log_z
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        # the tree's sums over paths go through the prompts, too
        grads[0] = grads[0] * (tree.role != Role.PROMPT)
        found.append((loss.detach(), *grads))
    return found


def _assert_equal(rows):
    for got, want in zip(*rows, strict=True):
        error, bound = float((got - want).abs().max()), 1e-10 * max(1.0, float(want.abs().max()))
        assert error <= bound
    assert float(rows[1][0]) > 1e-3 and float(rows[1][1].abs().max()) > 1e-3


@pytest.mark.parametrize("where", TREES)
@pytest.mark.parametrize("name", REGISTRY)
def test_tree_and_padded_forms_are_equal(name, where):
    tree = TREES[where]()
    weights = torch.linspace(0.2, 2.0, len(GROUP)).double()
    for normalization in ("group", "batch", "trajectory"):
        _assert_equal(_both(name, tree, normalization=normalization))
        _assert_equal(_both(name, tree, normalization=normalization, weights=weights))
    if name != "tb":
        _assert_equal(_both(name, tree, known=False))


@pytest.mark.parametrize("residual", LOSSES)
@pytest.mark.parametrize("name", REGISTRY)
def test_every_residual_loss(name, residual):
    tree = make_tree(min_length=1)
    _assert_equal(_both(name, tree, residual=residual, limit=0.7 if residual == "clamped" else None))


def test_tokens_of_a_tool_are_no_states():
    """In the padded form, states that may not stop; the objectives with flows have no form for them there."""
    for name in ("modified_subtb", "modified_db", "interpolated_subtb", "rooted_prefix_tb"):
        for residual in ("squared", "huber"):
            _assert_equal(_both(name, tool_tree(), residual=residual))


@pytest.mark.parametrize("subtb_lambda", [0.0, 0.7, 1.0])
def test_flows_against_a_double_loop_beside_tools(subtb_lambda):
    """Every state that the policy continues or may end takes part, terminable or not, and the end."""
    several = 0
    for tree in (tool_tree(), make_tree(min_length=2, sequences=[[5, 6], [5, 6, 7, 8]], group=[0, 0])):
        log_probs, log_reward, _, _ = random_values(tree)
        num, den = {}, {}
        for path in paths(tree):
            reached, u = torch.zeros(()).double(), []
            for node in path:
                reached = reached + (0 if node == path[0] else log_probs.log_pf[node])
                certain = bool(tree.must_stop[node])
                several += certain
                if tree.is_state[node] and not certain:
                    u.append(reached - log_probs.log_flow[node])
            u.append(reached + log_probs.log_pterm[path[-1]] - log_reward[path[-1]])
            group = int(tree.group[path[-1]])
            for i, j in combinations(range(len(u)), 2):
                weight = subtb_lambda ** (j - i - 1)
                num[group] = num.get(group, 0.0) + weight * (u[j] - u[i]) ** 2
                den[group] = den.get(group, 0.0) + weight
        want = sum(num[g] / den[g] for g in num) / len(num)
        got = subtb_loss(log_probs, tree=tree, log_reward=log_reward, subtb_lambda=subtb_lambda).loss
        leaves = log_probs.log_pf, log_probs.log_pterm, log_probs.log_flow
        first, second = (torch.autograd.grad(x, leaves) for x in (got, want))
        assert float(want) > 0.1 and abs(float(got - want)) <= 1e-10 * float(want)
        keep = tree.role != Role.PROMPT
        assert float(((first[0] - second[0]) * keep).abs().max()) <= 1e-10
        assert all(float((a - b).abs().max()) <= 1e-10 for a, b in zip(first[1:], second[1:], strict=True))
    assert several > 0


@pytest.mark.parametrize("loss", [subtb_loss, detailed_balance_loss])
def test_nothing_is_learned_where_stopping_is_certain(loss):
    """There F(s) = R(s) and no flow is read, but that of s_0, which is log Z(X)."""
    tree = make_tree()
    log_probs, log_reward, _, _ = random_values(tree)
    certain = tree.must_stop
    assert 0 < int(certain.sum()) < int(tree.is_state.sum())
    (grad,) = torch.autograd.grad(loss(log_probs, tree=tree, log_reward=log_reward).loss, log_probs.log_flow)
    assert bool((grad[certain] == 0).all()) and bool((grad[tree.is_state & ~certain] != 0).all())
    assert not bool(make_tree(termination="own").must_stop.any())
    root = make_tree([[]], [3])
    row = torch.where(root.is_root_state, 0, -1)
    root = replace(root, allowed=torch.tensor([[1, 0]], dtype=torch.uint8), allowed_row=row)
    log_probs, log_reward, _, _ = random_values(root)
    (node,) = root.leaf.tolist()
    want = (log_probs.log_flow + log_probs.log_pterm - log_reward)[node] ** 2
    got = loss(log_probs, tree=root, log_reward=log_reward).loss
    assert bool(root.must_stop[node]) and float(want) > 0
    assert float(got) == pytest.approx(float(want))


def test_one_full_span_is_trajectory_balance():
    """Where only the longest sequences may stop, the anchor and the end are the only states."""
    tree = make_tree([[5, 5, 5, 5, 5], [5, 5, 1, 2, 3], [2, 1, 4, 4, 4]], [0, 0, 1], min_length=MAX_LENGTH)
    log_probs, log_reward, log_z, _ = random_values(tree)
    options = dict(tree=tree, log_reward=log_reward, log_z=log_z)
    span, whole = (f(log_probs, **options).loss for f in (modified_subtb_loss, trajectory_balance_loss))
    assert float(whole) > 0.1 and abs(float(span - whole)) <= 1e-12 * float(whole)
    leaves = log_probs.log_pterm, log_z, log_probs.log_pf
    first, second = (torch.autograd.grad(x, leaves) for x in (span, whole))
    keep = tree.role != Role.PROMPT
    for a, b in ((first[0], second[0]), (first[1], second[1]), (first[2][keep], second[2][keep])):
        torch.testing.assert_close(a, b)


def test_the_second_mask_convention():
    for residual in ("squared", "huber"):
        for normalization in ("group", "batch", "trajectory"):
            for where in TREES.values():
                options = dict(include_sink=True, residual=residual, normalization=normalization)
                _assert_equal(_both("modified_subtb", where(), **options))
    plain, sink = (_both("modified_subtb", make_tree(), include_sink=x)[0][0] for x in (False, True))
    assert abs(float(plain - sink)) > 1e-2


def test_lambda_0_is_detailed_balance():
    tree = make_tree()
    for name, other in (("modified_subtb", "modified_db"), ("subtb", "db")):
        zero, one = (_both(x, tree, **o)[0] for x, o in ((name, {"subtb_lambda": 0.0}), (other, {})))
        assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))


def test_the_settings_know_every_objective_and_residual_loss():
    assert tuple(OBJECTIVES) == tuple(REGISTRY) and RESIDUAL_LOSSES == LOSSES
    for name in OBJECTIVES:
        log_z = {"tb": "scalar", "subtb": "head", "db": "head"}.get(name, "estimate")
        config = TrainConfig(objective=name, log_z=log_z)
        log_probs, log_reward, values, prior = random_values(make_tree())
        args = name, make_tree(), log_probs, log_reward, values, prior
        assert bool(tree_loss(*args, **config.objective_options).loss.isfinite())


@pytest.mark.parametrize("name", REGISTRY)
def test_gradients_of_the_tree_forms(name):
    """Against finite differences; log q(stop) of rooted prefixes has none by intention."""
    tree = make_tree([[6, 7], [6], [5, 5, 5, 5, 5], [2, 1]], [0, 0, 1, 2], min_length=1)
    scored, log_reward, log_z, prior = random_values(tree)
    options = OPTIONS.get(name, {}) | ({"missing_reward": 99.0} if name == "rooted_prefix_tb" else {})

    def loss(log_pf, log_pterm, log_flow, log_z):
        if name == "rooted_prefix_tb":
            log_pterm = log_pterm.detach()
        log_probs = LogProbs(log_pf, log_pterm, log_flow=log_flow)
        return tree_loss(name, tree, log_probs, log_reward, log_z, prior, **options).loss

    leaves = scored.log_pf, scored.log_pterm, scored.log_flow, log_z
    if name == "rooted_prefix_tb":
        leaves = (leaves[0], leaves[1].detach(), *leaves[2:])
    assert torch.autograd.gradcheck(loss, leaves)
