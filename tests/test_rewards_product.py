import math

import pytest
import torch
from replay_cases import rollouts_of

from fastgfn.checks import InputError
from fastgfn.functional.tree import node_sequences
from fastgfn.packing import pack
from fastgfn.rewards import RECENT, ProductReward, SequenceReward, log_factors, log_reward


def _tree():
    return pack(rollouts_of([[5, 6], [5, 7, 8], [], [9, 5, 6, 7]], prompts=([1, 2], [3]), group=[0, 0, 0, 1]))


def _product(**options):
    short = SequenceReward(lambda zs: [-1.0 * len(z) for z in zs])
    odd = SequenceReward(lambda zs: [-0.5 * sum(t % 2 for t in z) for z in zs])
    return ProductReward({"short": short, "odd": odd}, **options)


def test_a_product_is_the_sum_of_its_tempered_factors():
    tree = _tree()
    product = _product(temperatures={"short": 2.0, "odd": (4.0, 0.5, 10)})
    factors = product.factors(tree)
    want = [
        [-1.0 * len(z), -0.5 * sum(t % 2 for t in z)]
        for z in node_sequences(tree, torch.arange(tree.num_nodes))
    ]
    want = torch.tensor(want, dtype=torch.float64).masked_fill(~tree.terminable[:, None], 0.0)
    assert torch.equal(factors, want)
    # a call is under the last temperatures, at(step) under those of the step
    for reward, temperatures in (
        (product, (2.0, 0.5)),
        (product.at(0), (2.0, 4.0)),
        (product.at(5), (2.0, 2.25)),
        (product.at(10), (2.0, 0.5)),
        (product.at(99), (2.0, 0.5)),
    ):
        assert reward.temperatures == temperatures and reward.names == ("short", "odd")
        assert torch.equal(
            log_reward(tree, reward=reward), want[:, 0] / temperatures[0] + want[:, 1] / temperatures[1]
        )
    one = ProductReward({"only": product.rewards[0]})
    plain = log_reward(tree, reward=product.rewards[0])
    assert torch.equal(log_reward(tree, reward=one), plain)
    assert torch.equal(
        log_factors(tree, plain, reward=one), log_factors(tree, plain, reward=product.rewards[0])
    )
    assert torch.equal(log_factors(tree, plain, reward=product), want)


def test_a_product_computes_its_factors_once_per_tree():
    """Of the recent trees alone: what it keeps does not grow."""
    calls = []
    reward = ProductReward({"counted": SequenceReward(lambda zs: calls.append(1) or [0.0] * len(zs))})
    trees = [_tree() for _ in range(RECENT + 1)]
    for tree in (*trees[:3], *trees[:3]):
        log_factors(tree, log_reward(tree, reward=reward), reward=reward)
    assert len(calls) == 3
    for tree in (*trees, trees[0]):
        reward.factors(tree)
    assert len(calls) == RECENT + 2 and len(reward._known) == RECENT


def test_a_product_of_a_terminal_reward_is_terminal():
    whole = SequenceReward(lambda zs: [-1.0] * len(zs), terminal_only=True)
    everywhere = SequenceReward(lambda zs: [-2.0] * len(zs))
    product = ProductReward({"everywhere": everywhere, "whole": whole})
    assert product.terminal_only and product.at(3).terminal_only and not _product().terminal_only
    tree = _tree()
    value = log_reward(tree, reward=product)
    assert set(value[tree.leaf].tolist()) == {-3.0} and int((value != 0).sum()) == len(tree.leaf.unique())


def test_a_product_refuses_bad_input():
    with pytest.raises(InputError, match="factors must be at least one reward"):
        ProductReward({})
    with pytest.raises(InputError, match=r"temperatures must be of known factors, got \['lm'\]; use some of"):
        _product(temperatures={"lm": 1.0})
    for bad in (0.0, math.inf, "1", (1.0, 2.0), (1.0, -2.0, 10), (1.0, 2.0, 0), None):
        with pytest.raises(InputError, match="the temperature of 'odd' must be a number > 0 or"):
            _product(temperatures={"odd": bad})
    bad = SequenceReward(lambda zs: [-math.inf] * len(zs))
    with pytest.raises(InputError, match=r"log R \('bad'\) must be finite, got -inf for Z = \[\]"):
        log_reward(_tree(), reward=ProductReward({"good": _product(), "bad": bad}))
