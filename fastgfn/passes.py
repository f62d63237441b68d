"""The passes of a step over its tree: score and reward together, and a large tree in parts.

Neither changes a result. What parts of a tree have in common is known before the first of them is scored (the
coefficients of the windows or trajectories), or is read from a pass without gradient (log Z(X) of a prompt
whose trajectories lie in several parts, where the objective reads it); so the losses and gradients of the
parts add up to the whole's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.objectives import (
    Objective,
    group_mean,
    has_anchor,
    log_ratio,
    modified_subtb_loss,
    trajectory_coefficients,
    vargrad_loss,
    window_coefficients,
)
from fastgfn.packing import split_tree
from fastgfn.phases import phase
from fastgfn.rewards import LMReward, Reward, log_reward
from fastgfn.scoring import constrained, limits, score
from fastgfn.types import LogProbs, TokenTree, TreePart


@dataclass(frozen=True, slots=True)
class Pass:
    """What `add_gradients` computed on the way, all detached.

    loss: () float64, of the whole tree.
    log_z: (G,) group means of log R(x) / T_reward - log q(x).
    log_reward: (N,) un-tempered log R of every trajectory.
    log_pf: (T,) log q of every action node, as of `score`.
    """

    loss: Tensor
    log_z: Tensor
    log_reward: Tensor
    log_pf: Tensor


def score_and_reward(tree: TokenTree, *, policy: Policy, reward: Reward) -> tuple[LogProbs, Tensor]:
    """`score(tree, policy=policy)` and `log_reward(tree, reward=reward)`.

    If the reward is an LMReward of the policy's own reference, both share one pass over the head: one launch
    for all hidden rows, which reads the weight once.
    """
    shared = isinstance(reward, LMReward) and getattr(reward.reference, "policy", None) is policy
    # a subclass may compute something else
    if not shared or type(reward).__call__ is not LMReward.__call__:
        return score(tree, policy=policy), log_reward(tree, reward=reward)
    biases = (tree.constraints.logit_bias, reward.logit_bias)
    raw, base = policy.paired_log_probs(tree, *biases, **limits(tree))
    return constrained(raw, tree), log_reward(tree, reward=lambda t: reward.from_log_probs(base, t))


def add_gradients(
    tree: TokenTree,
    *,
    policy: Policy,
    reward: Reward,
    reward_temperature: float = 1.0,
    objective: str = "modified_subtb",
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    max_tokens: int | None = None,
    scale: float = 1.0,
) -> Pass:
    """Add the gradient of scale * the objective to `.grad` of the policy's parameters.

    Args:
        reward_temperature: divides log R.
        objective: "modified_subtb" or "vargrad", see fastgfn.objectives.
        subtb_lambda, normalization: of `modified_subtb_loss`; `vargrad_loss` has no subtb_lambda.
        max_tokens: a tree of more nodes is scored and differentiated in parts, see `split_tree`; no part's
            graph outlives it. Equal to one pass up to rounding; the price is that nodes which parts share
            are computed in each, and one more forward where log Z(X) has to be known beforehand.

    Raises:
        InputError: as `split_tree`, `log_reward` and the objective, which must fit the reward; no trajectory.
    """
    num = tree.leaf.shape[0]
    checks.check(num > 0, "add_gradients", "tree", "of at least one trajectory", num, "pack some rollouts")
    loss_of, coefficients, reads_log_z = _objective(objective, tree, reward, subtb_lambda, normalization)
    parts = split_tree(tree, max_tokens=max_tokens)
    log_z, known = None, [None] * len(parts)
    if reads_log_z and _share_groups(parts):
        log_z, known = _log_z(tree, parts, policy, reward, reward_temperature)

    def add(part: TreePart, raw_log_reward: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if raw_log_reward is None:
            log_probs, raw_log_reward = score_and_reward(part.tree, policy=policy, reward=reward)
        else:
            log_probs = score(part.tree, policy=policy)
        tempered = raw_log_reward / reward_temperature
        loss = loss_of(
            log_probs,
            tree=part.tree,
            log_reward=tempered,
            log_z=None if log_z is None else log_z[: part.tree.num_groups],
            coefficients=coefficients[part.trajectories],
        ).loss
        with phase("backward"):
            (loss * scale).backward()
        return (
            loss.detach().double(),
            log_ratio(log_probs, part.tree, tempered),
            raw_log_reward[part.tree.leaf],
            log_probs.log_pf.detach(),
        )

    results = [add(part, value) for part, value in zip(parts, known, strict=True)]
    losses, ratios, log_rewards, log_pfs = zip(*results, strict=True)
    log_z = group_mean(_by_trajectory(parts, ratios), tree)
    log_pf = _by_node(parts, log_pfs, tree.num_nodes)
    return Pass(torch.stack(losses).sum(), log_z, _by_trajectory(parts, log_rewards), log_pf)


def _objective(
    name: str, tree: TokenTree, reward: Reward, subtb_lambda: float, normalization: str
) -> tuple[Callable[..., Objective], Tensor, bool]:
    """The loss of a part, the (N,) coefficients of the whole tree, and whether the loss reads log Z(X)."""
    want, fix = "'modified_subtb' or 'vargrad'", "use 'modified_subtb'"
    checks.check(name in ("modified_subtb", "vargrad"), "add_gradients", "objective", want, repr(name), fix)
    if name == "vargrad":
        return vargrad_loss, trajectory_coefficients(tree, normalization=normalization), True
    want, fix = "defined on every terminable prefix", "use objective='vargrad'"
    whole_only = getattr(reward, "terminal_only", False)
    checks.check(not whole_only, "add_gradients", "reward", want, "a terminal-only reward", fix)
    coefficients = window_coefficients(tree, subtb_lambda=subtb_lambda, normalization=normalization)
    return partial(modified_subtb_loss, subtb_lambda=subtb_lambda), coefficients, has_anchor(tree)


def _share_groups(parts: Sequence[TreePart]) -> bool:
    """Whether the trajectories of a prompt lie in more than one part."""
    groups = torch.cat([part.tree.group[part.tree.leaf].unique() for part in parts])
    return len(groups) > len(groups.unique())


@torch.no_grad()
def _log_z(
    tree: TokenTree, parts: Sequence[TreePart], policy: Policy, reward: Reward, reward_temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """(G,) log Z(X) as the whole tree's loss would estimate it, and the un-tempered log R of every part."""
    ratios, raw = [], []
    for part in parts:
        log_probs, values = score_and_reward(part.tree, policy=policy, reward=reward)
        ratios.append(log_ratio(log_probs, part.tree, values / reward_temperature))
        raw.append(values)
    return group_mean(_by_trajectory(parts, ratios), tree), raw


def _by_node(parts: Sequence[TreePart], values: Sequence[Tensor], num_nodes: int) -> Tensor:
    """(T,) values of each part's nodes; those that parts share are equal up to rounding."""
    whole = values[0].new_zeros(num_nodes)
    for part, own in zip(parts, values, strict=True):
        whole[part.nodes] = own
    return whole


def _by_trajectory(parts: Sequence[TreePart], values: Sequence[Tensor]) -> Tensor:
    """(N,) values of each part's trajectories, in the order of the whole tree."""
    return torch.cat(list(values))[torch.cat([part.trajectories for part in parts]).argsort()]
