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
from fastgfn.functional.importance import importance_weights
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
from fastgfn.rewards import LMReward, Reward, log_factors, log_reward
from fastgfn.scoring import constrained, limits, score
from fastgfn.types import LogProbs, TokenTree, TreePart


@dataclass(frozen=True, slots=True)
class Pass:
    """What `add_gradients` computed on the way, all detached.

    loss: () float64, of the whole tree.
    log_z: (G,) group means of log R(x) / T_reward - log q(x).
    log_reward: (N,) log R of every trajectory, not divided by reward_temperature.
    log_factors: (N, K) its un-tempered factors, of a `ProductReward`; of any other reward (N, 1), itself.
    log_q: (N,) float64 log q of every trajectory, the stop included.
    log_pf: (T,) log q of every action node, as of `score`.
    """

    loss: Tensor
    log_z: Tensor
    log_reward: Tensor
    log_factors: Tensor
    log_q: Tensor
    log_pf: Tensor


def score_and_reward(tree: TokenTree, *, policy: Policy, reward: Reward) -> tuple[LogProbs, Tensor]:
    """`score(tree, policy=policy)` and `log_reward(tree, reward=reward)`.

    If the reward is an LMReward of the policy's own reference, both share one pass over the head: one launch
    for all hidden rows, which reads the weight once.
    """
    shared = isinstance(reward, LMReward) and getattr(reward.reference, "policy", None) is policy
    # a subclass may compute something else, and suffixes make another tree
    if not shared or reward.suffixes is not None or type(reward).__call__ is not LMReward.__call__:
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
    log_behavior: Tensor | None = None,  # (N,)
    importance_clip: tuple[float, float] | None = None,
) -> Pass:
    """Add the gradient of scale * the objective to `.grad` of the policy's parameters.

    Args:
        reward_temperature: divides log R.
        objective: "modified_subtb" or "vargrad", see fastgfn.objectives.
        subtb_lambda, normalization: of `modified_subtb_loss`; `vargrad_loss` has no subtb_lambda.
        max_tokens: a tree of more nodes is scored and differentiated in parts, see `split_tree`; no part's
            graph outlives it. Equal to one pass up to rounding; the price is that nodes which parts share
            are computed in each, and one more forward where log Z(X) has to be known beforehand.
        log_behavior, importance_clip: where a clip (low, high) is given, trajectories are weighed with
            `functional.importance.importance_weights`, 1 where log_behavior is NaN (unknown); numerator only.

    Raises:
        InputError: as `split_tree`, `log_reward` and the objective, which must fit the reward; no trajectory.
    """
    checks.check(len(tree.leaf) > 0, "add_gradients", "tree", "of at least one trajectory", 0, "pack some")
    loss_of, coefficients, reads_log_z = _objective(objective, tree, reward, subtb_lambda, normalization)
    parts = split_tree(tree, max_tokens=max_tokens)
    weights_of = partial(_weights, log_behavior=log_behavior, clip=importance_clip)
    log_z, known = None, [None] * len(parts)
    if reads_log_z and _share_groups(parts):
        log_z, known = _log_z(tree, parts, policy, reward, reward_temperature)

    def add(part: TreePart, raw_log_reward: Tensor | None) -> tuple[Tensor, ...]:
        log_probs, raw_log_reward = _scored(part.tree, raw_log_reward, policy, reward)
        tempered = raw_log_reward / reward_temperature
        log_q = trajectory_log_q(log_probs, part.tree)
        loss = loss_of(
            log_probs,
            tree=part.tree,
            log_reward=tempered,
            log_z=None if log_z is None else log_z[: part.tree.num_groups],
            coefficients=coefficients[part.trajectories] * weights_of(log_q, part),
        ).loss
        with phase("backward"):
            (loss * scale).backward()
        return (
            loss.detach().double(),
            log_ratio(log_probs, part.tree, tempered),
            raw_log_reward[part.tree.leaf],
            log_factors(part.tree, raw_log_reward, reward=reward)[part.tree.leaf],
            log_q,
            log_probs.log_pf.detach(),
        )

    return _gathered(tree, parts, [add(part, value) for part, value in zip(parts, known, strict=True)])


def _scored(tree: TokenTree, known: Tensor | None, policy: Policy, reward: Reward) -> tuple[LogProbs, Tensor]:
    """`score_and_reward`, or `score` where log R is known."""
    if known is None:
        return score_and_reward(tree, policy=policy, reward=reward)
    return score(tree, policy=policy), known


def _gathered(tree: TokenTree, parts: Sequence[TreePart], results: Sequence[tuple[Tensor, ...]]) -> Pass:
    """The whole tree's, from the loss, (N',) values and (T',) log q of every part."""
    losses, *by_trajectory, log_pfs = zip(*results, strict=True)
    ratios, *rest = (_by_trajectory(parts, values) for values in by_trajectory)
    log_pf = _by_node(parts, log_pfs, tree.num_nodes)
    return Pass(torch.stack(losses).sum(), group_mean(ratios, tree), *rest, log_pf)


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


def trajectory_log_q(log_probs: LogProbs, tree: TokenTree) -> Tensor:
    """(N,) float64 log q of every trajectory, the stop included, without gradient."""
    return -log_ratio(log_probs, tree, torch.zeros_like(log_probs.log_pf)).double()


def _weights(
    log_q: Tensor, part: TreePart, *, log_behavior: Tensor | None, clip: tuple[float, float] | None
) -> Tensor | float:
    """(N',) importance weights of a part's trajectories, or 1."""
    if clip is None:
        return 1.0
    drawn = log_behavior.to(log_q.device)[part.trajectories]
    return importance_weights(log_q, drawn, clip=clip, unknown_as_one=True)


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
