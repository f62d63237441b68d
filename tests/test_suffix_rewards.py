"""p(X Z Y): a copy of Y below every prefix, against a plain forward per prefix."""

import math

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.functional.suffixes import hang_suffixes
from fastgfn.functional.tree import node_sequences
from fastgfn.packing import pack, split_tree
from fastgfn.passes import score_and_reward
from fastgfn.rewards import LMReward, log_reward
from fastgfn.scoring import score
from fastgfn.types import Constraints, Role, Rollouts

PROMPTS = ([1, 2], [3])


def _tree(**limits):
    constraints = Constraints(0, **({"max_length": 4} | limits))
    tokens = torch.tensor(
        [[5, 6, 0, 0], [5, 7, 8, 0], [5, 6, 9, 0], [9, 5, 6, 7], [9, 5, 6, 7], [9, 5, 8, 0]]
    )
    lengths, group = torch.tensor([2, 3, 3, 4, 4, 3]), torch.tensor([0, 0, 0, 1, 1, 1])
    prompts = tuple(map(torch.tensor, PROMPTS))
    return pack(Rollouts(prompts, group, tokens, lengths, torch.zeros(6), constraints))


def _plain_log_p(plain, prompt, z, y, bias):
    ids = [*prompt, *z, *y]
    logits = plain.model(input_ids=torch.tensor([ids])).logits[0]
    log_p = (logits if bias is None else logits + bias).log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))


BIAS = torch.where(torch.arange(13) == 6, -1.5, 0.3).double()
# Y for all prompts; of one token; by prompt; candidates of several lengths, the same first token among them
SUFFIXES = {
    "one": [4, 11, 2],
    "token": [7],
    "by-prompt": {(1, 2): [4, 11], (3,): [10, 2, 2, 5]},
    "candidates": [[4, 11], [4, 11, 2], [9]],
    "both": {(1, 2): [[4], [11, 0]], (3,): [10, 2, 2]},
}


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize(
    ("limits", "max_tokens"), [({}, None), ({"min_length": 2}, 18)], ids=["whole", "min_length-in-parts"]
)
def test_equals_a_forward_per_prefix(tiny_policy, name, limits, max_tokens):
    policy, plain, tree = tiny_policy(), tiny_policy(implementation="sdpa"), _tree(**limits)
    bias = None if name == "token" else BIAS
    reward = LMReward(policy.reference, logit_bias=bias, suffixes=SUFFIXES[name], max_tokens=max_tokens)
    value = log_reward(tree, reward=reward)
    assert value.dtype == torch.float64 and not value.requires_grad
    nodes = tree.terminable.nonzero()[:, 0]
    with torch.no_grad(), plain.model.disable_adapter():
        for node, z in zip(nodes.tolist(), node_sequences(tree, nodes), strict=True):
            prompt = PROMPTS[int(tree.group[node])]
            y = SUFFIXES[name]
            y = y[tuple(prompt)] if isinstance(y, dict) else y
            several = y if isinstance(y[0], list) else [y]
            terms = [_plain_log_p(plain, prompt, z, y, bias) for y in several]
            want = math.log(sum(map(math.exp, terms)))
            assert float(value[node]) == pytest.approx(want, abs=1e-10)
    assert not value[~tree.terminable].any()


def test_parts_are_no_larger_than_asked(tiny_policy, seen_tokens):
    policy, tree = tiny_policy(), _tree()
    seen_tokens.clear()
    reward = LMReward(policy.reference, suffixes=[4, 11, 2], max_tokens=12)
    log_reward(tree, reward=reward)
    assert len(seen_tokens) > 1 and max(seen_tokens) <= 12
    seen_tokens.clear()
    log_reward(tree, reward=LMReward(policy.reference, suffixes=[4, 11, 2]))
    assert seen_tokens == [tree.num_nodes + 3 * int(tree.terminable.sum())]


def test_parts_of_a_tree_have_the_rewards_of_the_whole(tiny_policy):
    """The second part holds none of the first prompt's nodes."""
    tree = _tree()
    reward = LMReward(tiny_policy().reference, suffixes=SUFFIXES["both"])
    whole = log_reward(tree, reward=reward)
    parts = split_tree(tree, max_tokens=7)
    assert any(0 not in part.tree.group for part in parts)
    for part in parts:
        value = log_reward(part.tree, reward=reward)
        assert float((value - whole[part.nodes]).abs().max()) < 1e-10


def test_the_larger_tree_is_a_tree_in_depth_first_order():
    tree = _tree(min_length=1)
    large, above = hang_suffixes(tree, [[[4, 11], [4]], [[2, 2, 2]]])
    parent, end = large.parent.tolist(), large.end.tolist()
    for node, up in enumerate(parent):
        assert up < node and (up < 0 or end[node] <= end[up])
        assert int(large.position[node]) == (0 if up < 0 else int(large.position[up]) + 1)
        assert large.group[node] == large.group[max(up, 0)] or up < 0
        inside = [n for n in range(large.num_nodes) if node <= n < end[node]]
        assert int(large.count[node]) == sum(n in inside for n in large.leaf.tolist())
    assert torch.equal(large.tokens[large.role != Role.SUFFIX], tree.tokens)
    assert above.tolist() == sorted(above.tolist())
    assert not large.is_state.any()


def test_own_termination_penalises_short_prefixes(tiny_policy):
    tree = _tree(min_length=1, termination="own")
    value = log_reward(tree, reward=LMReward(tiny_policy().reference, suffixes=[4]))
    assert value[tree.is_root_state].tolist() == [-99.0, -99.0]


def test_score_and_reward_takes_the_suffixes_into_account(tiny_policy):
    policy, tree = tiny_policy(), _tree()
    reward = LMReward(policy.reference, suffixes=[4, 11])
    with torch.no_grad():
        log_probs, value = score_and_reward(tree, policy=policy, reward=reward)
        alone = score(tree, policy=policy)
    assert torch.equal(value, log_reward(tree, reward=reward))
    assert torch.equal(log_probs.log_pf, alone.log_pf) and torch.equal(log_probs.log_pterm, alone.log_pterm)


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        ([], "non-empty lists"),
        ([[4], []], "non-empty lists"),
        ([4.0], "non-empty lists"),
        ([4, 13], r"token ids in \[0, 13\)"),
        ({(1, 2): [4]}, r"given for every prompt, got none for \[3\]"),
    ],
    ids=["empty", "empty-candidate", "float", "outside", "prompt-without"],
)
def test_refuses_bad_suffixes(tiny_policy, suffixes, message):
    with pytest.raises(InputError, match=message):
        log_reward(_tree(), reward=LMReward(tiny_policy().reference, suffixes=suffixes))
