"""The passes of a step over its tree: score and reward together, and a large tree in parts.

Neither changes a result. What parts of a tree have in common is known before the first of them is scored (the
coefficients of the windows or trajectories), or is read from a pass without gradient (log Z(X) of a prompt
whose trajectories lie in several parts, where the objective reads it); so the losses and gradients of the
parts add up to the whole's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional.importance import importance_weights
from fastgfn.models import Policy
from fastgfn.objectives import REGISTRY, Objective, Spec, group_mean, log_q
from fastgfn.packing import split_tree
from fastgfn.phases import phase
from fastgfn.rewards import LMReward, Reward, log_factors, log_reward
from fastgfn.scoring import constrained, limits, score
from fastgfn.types import LogProbs, TokenTree, TreePart


@dataclass(frozen=True, slots=True)
class Pass:
    """What `add_gradients` computed on the way, all detached.

    loss: () float64, of the whole tree.
    log_z: (G,) group means of log_ratio.
    log_ratio: (N,) what every trajectory says that log Z(X) is: log R(x) / T_reward - log q(x), or what the
        objective takes for it.
    log_reward: (N,) log R of every trajectory, not divided by reward_temperature.
    log_factors: (N, K) its un-tempered factors, of a `ProductReward`; of any other reward (N, 1), itself.
    log_q: (N,) float64 log q of every trajectory, the stop included.
    log_pf: (T,) log q of every action node, as of `score`.
    known_log_z: (G,) log Z(X) as it was passed in or as the flow head says, or None.
    """

    loss: Tensor
    log_z: Tensor
    log_ratio: Tensor
    log_reward: Tensor
    log_factors: Tensor
    log_q: Tensor
    log_pf: Tensor
    known_log_z: Tensor | None = None


class _Truth(NamedTuple):
    """Of a part's nodes, without gradient: un-tempered log R, and log p of the prior if it is read."""

    log_reward: Tensor
    prior: LogProbs | None = None


class _Losses(NamedTuple):
    """The objective of any part of a tree; coefficients and log_behavior (N,) are those of the whole."""

    spec: Spec
    options: dict
    coefficients: Tensor
    reward_temperature: float | Tensor
    log_behavior: Tensor | None = None
    importance_clip: tuple[float, float] | None = None

    def __call__(self, part: TreePart, log_probs: LogProbs, truth: _Truth, log_z: Tensor | None) -> Objective:
        options = dict(self.options)
        if self.spec.reads_prior:
            options["prior"] = truth.prior
        if self.spec.reads_log_z(part.tree):
            options["log_z"] = log_z
        coefficients = self.coefficients[part.trajectories]
        if self.importance_clip is not None:
            drawn = self.log_behavior.to(coefficients.device)[part.trajectories]
            own_log_q = trajectory_log_q(log_probs, part.tree)
            clip = dict(clip=self.importance_clip, unknown_as_one=True)
            coefficients = coefficients * importance_weights(own_log_q, drawn, **clip)
        value = _tempered(truth.log_reward, part.tree, self.reward_temperature)
        return self.spec.loss(
            log_probs, tree=part.tree, log_reward=value, coefficients=coefficients, **options
        )


def score_and_reward(tree: TokenTree, *, policy: Policy, reward: Reward) -> tuple[LogProbs, Tensor]:
    """`score(tree, policy=policy)` and `log_reward(tree, reward=reward)`.

    If the reward is an LMReward of the policy's own reference, both share one pass over the head: one launch
    for all hidden rows, which reads the weight once.
    """
    if not _reads_reference(reward, policy):
        return score(tree, policy=policy), log_reward(tree, reward=reward)
    biases = (tree.constraints.logit_bias, reward.logit_bias)
    raw, base = policy.paired_log_probs(tree, *biases, **limits(tree))
    return constrained(raw, tree), log_reward(tree, reward=lambda t: reward.from_log_probs(base, t))


def prior_and_reward(tree: TokenTree, *, policy: Policy, reward: Reward) -> tuple[LogProbs, Tensor]:
    """`score(tree, policy=policy.reference)` and `log_reward(tree, reward=reward)`.

    If the reward is an LMReward of the policy's own reference, both share one forward of the tree.
    """
    reference = policy.reference
    with phase("reward"):
        hidden = reference.tree_hidden(tree.tokens, tree.position, tree.end)

        def log_p(logit_bias, **limits):
            return reference.tree_log_probs(tree, logit_bias, hidden=hidden, **limits)

        prior = constrained(log_p(tree.constraints.logit_bias, **limits(tree)), tree)
    if not _reads_reference(reward, policy):
        return prior, log_reward(tree, reward=reward)
    return prior, log_reward(tree, reward=lambda t: reward.from_log_probs(log_p(reward.logit_bias), t))


def _reads_reference(reward: Reward, policy: Policy) -> bool:
    shared = isinstance(reward, LMReward) and getattr(reward.reference, "policy", None) is policy
    # a subclass may compute something else, and so do suffixes, on another tree
    plain = type(reward).__call__ is LMReward.__call__ and getattr(reward, "suffixes", None) is None
    return shared and plain


def add_gradients(
    tree: TokenTree,
    *,
    policy: Policy,
    reward: Reward,
    reward_temperature: float | Tensor = 1.0,
    objective: str = "modified_subtb",
    log_z: Tensor | str | None = None,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_behavior: Tensor | None = None,  # (N,)
    importance_clip: tuple[float, float] | None = None,
    max_tokens: int | None = None,
    scale: float = 1.0,
    **options,
) -> Pass:
    """Add the gradient of scale * the objective to `.grad` of the policy's parameters and of log_z's.

    Args:
        reward_temperature: > 0, divides log R; one number, or (G,) one for each prompt.
        objective: a name of fastgfn.objectives.REGISTRY; `options` are the further arguments of its loss,
            such as subtb_lambda or residual_loss.
        log_z: (G,) log Z(X) of every prompt, which may require a gradient; "head": log F(s_0) of the policy's
            flow head; None: estimated from the trajectories. Read where the objective reads one.
        normalization, weights: of the objective; weights are importance weights.
        log_behavior, importance_clip: where a clip (low, high) is given, trajectories are weighed with
            `functional.importance_weights`, 1 where log_behavior is NaN (unknown); numerator only.
        max_tokens: a tree of more nodes is scored and differentiated in parts, see `split_tree`; no part's
            graph outlives it. Equal to one pass up to rounding; the price is that nodes which parts share
            are computed in each, and one more forward where log Z(X) has to be estimated beforehand.

    Raises:
        InputError: as `split_tree`, `log_reward` and the objective, which must fit the reward; no trajectory.
    """
    loss_of = _losses(tree, policy, reward, objective, reward_temperature, normalization, weights, options)
    loss_of = _weighed(loss_of, tree, log_behavior, importance_clip)
    parts, is_given = split_tree(tree, max_tokens=max_tokens), log_z is not None
    truths: Sequence[_Truth | None] = [None] * len(parts)
    if not is_given and loss_of.spec.reads_log_z(tree) and _share_groups(parts):
        ratios, truths = _ratios(parts, loss_of, policy, reward)
        log_z = group_mean(_by_trajectory(parts, ratios), tree)
    # one leaf for all parts, so that what log_z was computed from is differentiated once
    shared = log_z.detach().requires_grad_(log_z.requires_grad) if isinstance(log_z, Tensor) else log_z

    def add(part: TreePart, truth: _Truth | None) -> tuple[Tensor, ...]:
        log_probs, truth = _scored(part.tree, loss_of.spec, policy, reward, truth)
        own_log_z = _log_z_of(shared, part.tree, log_probs)
        result = loss_of(part, log_probs, truth, own_log_z)
        own_log_z = None if own_log_z is None else own_log_z.detach()
        with phase("backward"):
            (result.loss * scale).backward()
        leaf, factors = part.tree.leaf, log_factors(part.tree, truth.log_reward, reward=reward)
        loss, log_pf = result.loss.detach().double(), log_probs.log_pf.detach()
        log_qs = trajectory_log_q(log_probs, part.tree)
        return loss, result.log_ratio, truth.log_reward[leaf], factors[leaf], log_qs, log_pf, own_log_z

    results = [add(part, truth) for part, truth in zip(parts, truths, strict=True)]
    if isinstance(shared, Tensor) and shared.grad is not None:
        log_z.backward(shared.grad)
    return _whole(tree, parts, results, is_given)


def estimate_log_z(
    tree: TokenTree,
    *,
    policy: Policy,
    reward: Reward,
    reward_temperature: float | Tensor = 1.0,
    objective: str = "modified_subtb",
    max_tokens: int | None = None,
    **options,
) -> Tensor:
    """(G,) float64 group means of what every trajectory says that log Z(X) is, without gradient: where to
    start a learned log Z(X). It lies below the true one by the distance KL(q || posterior) on average.

    Args and raises: as `add_gradients`.
    """
    loss_of = _losses(tree, policy, reward, objective, reward_temperature, "group", None, options)
    parts = split_tree(tree, max_tokens=max_tokens)
    return group_mean(_by_trajectory(parts, _ratios(parts, loss_of, policy, reward)[0]), tree)


def _losses(
    tree: TokenTree,
    policy: Policy,
    reward: Reward,
    objective: str,
    reward_temperature: float | Tensor,
    normalization: str,
    weights: Tensor | None,
    options: dict,
) -> _Losses:
    name, num = "add_gradients", tree.leaf.shape[0]
    checks.check(num > 0, name, "tree", "of at least one trajectory", num, "pack some rollouts")
    _check_temperature(name, tree, reward_temperature)
    want, fix = f"one of {tuple(REGISTRY)}", "use 'modified_subtb'"
    checks.check(objective in REGISTRY, name, "objective", want, repr(objective), fix)
    spec = REGISTRY[objective]
    want, fix = "defined on every terminable prefix", "use objective='vargrad'"
    fits = not (spec.reads_prefixes and getattr(reward, "terminal_only", False))
    checks.check(fits, name, "reward", want, "a terminal-only reward", fix)
    pools_by = {key: options[key] for key in spec.pools_by if key in options}
    coefficients = spec.coefficients(tree, normalization=normalization, weights=weights, **pools_by)
    return _Losses(spec, options, coefficients, reward_temperature)


def _weighed(
    loss_of: _Losses, tree: TokenTree, log_behavior: Tensor | None, clip: tuple[float, float] | None
) -> _Losses:
    if clip is None:
        return loss_of
    name, arg, fix = "add_gradients", "log_behavior", "pass the rollouts' own, nan where unknown"
    checks.check(log_behavior is not None, name, arg, "given with an importance_clip", None, fix)
    checks.check_shape(name, arg, log_behavior, tuple(tree.leaf.shape), fix)
    return loss_of._replace(log_behavior=log_behavior, importance_clip=clip)


def _whole(tree: TokenTree, parts: Sequence[TreePart], results: Sequence[tuple], is_given: bool) -> Pass:
    """Of all parts together: (loss, log_ratio, log_reward, log_factors, log_q, log_pf, log_z) of each."""
    losses, *by_trajectory, log_pfs, log_zs = zip(*results, strict=True)
    log_ratio, *others = (_by_trajectory(parts, values) for values in by_trajectory)
    log_pf, means = _by_node(parts, log_pfs, tree.num_nodes), group_mean(log_ratio, tree)
    known = torch.zeros_like(means) if is_given else None
    for part, log_z in zip(parts, log_zs, strict=True) if is_given else ():
        groups = part.tree.group[part.tree.leaf].long()
        known[groups] = log_z.to(known)[groups]
    return Pass(torch.stack(losses).sum(), means, log_ratio, *others, log_pf, known)


def _scored(
    tree: TokenTree, spec: Spec, policy: Policy, reward: Reward, truth: _Truth | None
) -> tuple[LogProbs, _Truth]:
    if truth is not None:
        return score(tree, policy=policy), truth
    if spec.reads_prior:
        prior, value = prior_and_reward(tree, policy=policy, reward=reward)
        return score(tree, policy=policy), _Truth(value, prior)
    log_probs, value = score_and_reward(tree, policy=policy, reward=reward)
    return log_probs, _Truth(value)


def _log_z_of(log_z: Tensor | str | None, tree: TokenTree, log_probs: LogProbs) -> Tensor | None:
    """(G',) log Z(X) of the prompts of a part, which keep their numbers."""
    if log_z is None or isinstance(log_z, Tensor):
        return log_z if log_z is None else log_z[: tree.num_groups]
    flow, fix = log_probs.log_flow, "set one, see fastgfn.models.flow"
    checks.check(flow is not None, "add_gradients", "policy.flow_head", "a head", None, fix)
    roots = tree.is_root_state.nonzero()[:, 0]
    zeros = torch.zeros(tree.num_groups, dtype=flow.dtype, device=flow.device)
    return zeros.index_copy(0, tree.group[roots].long(), flow[roots])


@torch.no_grad()
def trajectory_log_q(log_probs: LogProbs, tree: TokenTree) -> Tensor:
    """(N,) float64 log q of every trajectory, the stop included, without gradient."""
    return log_q(log_probs, tree)


def _share_groups(parts: Sequence[TreePart]) -> bool:
    """Whether the trajectories of a prompt lie in more than one part."""
    groups = torch.cat([part.tree.group[part.tree.leaf].unique() for part in parts])
    return len(groups) > len(groups.unique())


@torch.no_grad()
def _ratios(
    parts: Sequence[TreePart], loss_of: _Losses, policy: Policy, reward: Reward
) -> tuple[list[Tensor], list[_Truth]]:
    """What the trajectories of every part say that log Z(X) is, and log R and the prior of every part."""
    ratios, truths = [], []
    for part in parts:
        log_probs, truth = _scored(part.tree, loss_of.spec, policy, reward, None)
        # of no influence on a ratio
        any_log_z = torch.zeros(part.tree.num_groups, device=part.nodes.device)
        ratios.append(loss_of(part, log_probs, truth, any_log_z).log_ratio)
        truths.append(truth)
    return ratios, truths


def _check_temperature(name: str, tree: TokenTree, temperature: float | Tensor) -> None:
    values, fix = torch.as_tensor(temperature), "pass one number, or one per prompt"
    if values.dim():
        checks.check_shape(name, "reward_temperature", values, (tree.num_groups,), fix)
    positive = bool((values > 0).all())
    checks.check(positive, name, "reward_temperature", "> 0", float(values.min()), fix)


def _tempered(log_reward: Tensor, tree: TokenTree, temperature: float | Tensor) -> Tensor:
    """(T,) log R / T of each node's prompt."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(log_reward)[tree.group.long()]
    return log_reward / temperature


def _by_node(parts: Sequence[TreePart], values: Sequence[Tensor], num_nodes: int) -> Tensor:
    """(T,) values of each part's nodes; those that parts share are equal up to rounding."""
    whole = values[0].new_zeros(num_nodes)
    for part, own in zip(parts, values, strict=True):
        whole[part.nodes] = own
    return whole


def _by_trajectory(parts: Sequence[TreePart], values: Sequence[Tensor]) -> Tensor:
    """(N,) values of each part's trajectories, in the order of the whole tree."""
    return torch.cat(list(values))[torch.cat([part.trajectories for part in parts]).argsort()]
