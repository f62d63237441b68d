import math

import pytest
import torch

from fastgfn.checks import InputError, InputTypeError
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, SequenceReward, log_reward, node_sequences
from fastgfn.types import Constraints, Rollouts


def _tree(**limits):
    constraints = Constraints(0, **({"max_length": 4} | limits))
    tokens = torch.tensor([[5, 6, 0, 0], [5, 7, 8, 0], [0, 0, 0, 0], [9, 5, 6, 7]])
    lengths = torch.tensor([2, 3, 0, 4])
    if constraints.min_length and constraints.termination == "forced":
        tokens[2], lengths[2] = tokens[0], 2
    group = torch.tensor([0, 0, 0, 1])
    prompts = (torch.tensor([1, 2]), torch.tensor([3]))
    return pack(Rollouts(prompts, group, tokens, lengths, torch.zeros(4), constraints))


def test_sequence_reward_sees_every_terminable_prefix_once():
    seen = []
    log_reward(_tree(), reward=SequenceReward(lambda zs: seen.extend(map(tuple, zs)) or [0.0] * len(zs)))
    want = [(), (5,), (5, 6), (5, 7), (5, 7, 8), (), (9,), (9, 5), (9, 5, 6), (9, 5, 6, 7)]
    assert sorted(seen) == sorted(want)
    seen.clear()
    log_reward(
        _tree(min_length=2), reward=SequenceReward(lambda zs: seen.extend(map(tuple, zs)) or [0.0] * len(zs))
    )
    assert sorted(seen) == sorted(z for z in want if len(z) >= 2)


def test_lm_reward_is_the_base_models_joint_log_prob(tiny_policy):
    policy, plain = tiny_policy(), tiny_policy(implementation="sdpa")
    tree = _tree()
    value = log_reward(tree, reward=LMReward(policy.reference))
    prompts = [[1, 2], [3]]
    nodes = tree.terminable.nonzero()[:, 0]
    with torch.no_grad(), plain.model.disable_adapter():
        for node, z in zip(nodes.tolist(), node_sequences(tree, nodes), strict=True):
            prompt = prompts[int(tree.group[node])]
            ids = prompt + z + [0]
            log_p = plain.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            want = sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
            assert float(value[node]) == pytest.approx(want, abs=1e-9)
    assert not value.requires_grad


def test_own_termination_penalises_short_prefixes(tiny_policy):
    tree = _tree(min_length=1, termination="own")
    value = log_reward(tree, reward=LMReward(tiny_policy().reference))
    assert value[tree.is_root_state].tolist() == [-99.0, -99.0]


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        (
            lambda t: torch.zeros(3),
            InputError,
            r"must be \(10,\), got \(3,\); return one value per tree node|must be",
        ),
        (lambda t: [0.0], InputTypeError, "must be a floating-point tensor, got list"),
        (lambda t: torch.zeros(t.num_nodes, dtype=torch.int64), InputTypeError, "got torch.int64"),
        (SequenceReward(lambda zs: [0.0]), InputError, "the function's result must be"),
        (
            SequenceReward(lambda zs: [math.nan if z == [5, 7] else 0.0 for z in zs]),
            InputError,
            r"nan for Z = \[5, 7\]",
        ),
        (SequenceReward(lambda zs: [-math.inf] * len(zs)), InputError, "log R must be finite, got -inf"),
    ],
    ids=["shape", "list", "integers", "one-value", "nan", "inf"],
)
def test_refuses_bad_rewards(reward, kind, message):
    with pytest.raises(kind, match=message):
        log_reward(_tree(), reward=reward)
