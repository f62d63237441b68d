"""Balance of whole trajectories, which needs no more than a reward of whole ones.

Each objective says what every trajectory alone takes log Z(X) for, its ratio, and pays for log Z(X) - ratio.
"""

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.objectives.pooling import (
    Objective,
    Pooling,
    Residual,
    check_inputs,
    check_normalization,
    group_mean,
    known_log_z,
    log_q,
    trajectory_coefficients,
)
from fastgfn.ops.scan import tree_cumsum
from fastgfn.phases import phase
from fastgfn.types import LogProbs, Role, TokenTree


@phase("loss")
def trajectory_balance_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    log_z: Tensor,  # (G,) or ()
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """Trajectory balance on a token tree, O(T); zero where q is R / Z(X) on what was drawn.

    loss = mean of (log_z + log q(x) - log R(x))^2, every action and the final stop in q(x), per prompt, then
    over prompts. Choose it over `vargrad_loss` where few sequences of a prompt are drawn at once, so that
    their mean is a poor log Z(X); a learned one is late wherever q moves fast.
    Malkin et al. 2022 (arXiv:2201.13259); here a mean over prompts of means over their sequences.

    Args:
        log_z: of every prompt, or () one for all, which is right for one prompt alone; a learned value
            receives its gradient.
        The others, raises: as `vargrad_loss`.
    """
    fix = "use vargrad_loss, which estimates it"
    checks.check(log_z is not None, "trajectory_balance_loss", "log_z", "a tensor", None, fix)
    ratio = target_ratio("trajectory_balance_loss", log_probs, tree, log_reward)
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    return _balanced("trajectory_balance_loss", tree, ratio, log_z, pooling, residual, log_probs.log_pf.dtype)


@phase("loss")
def vargrad_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,)
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """VarGrad on a token tree: the variance of log q(x) - log R(x) over each prompt's trajectories, O(T);
    zero exactly when q is proportional to R on what was drawn.

    With delta = log q(x) - log R(x), every action and the final stop in it, and m the mean of delta over the
    n trajectories of the prompt, under this policy and detached,
        loss = mean over prompts of 1/n sum over trajectories of (delta - m)^2.
    Deviations from a mean add up to 0, so that m needs no gradient: this one is exactly that of the variance,
    and n / (n - 1) times it that of its unbiased estimate. Minus m estimates log Z(X), which nobody has to
    learn. A prompt with a single trajectory adds nothing. The default for rewards of whole sequences.

    Richter et al. 2020 (arXiv:2010.10436), Zhang et al. 2023 (arXiv:2302.05446).

    Args:
        log_reward: (T,) log R / T_reward, already tempered; read only where a trajectory stops.
        normalization: a mean per prompt, then over prompts ("group"); "batch" and "trajectory" are the mean
            over all trajectories.
        weights: importance weights of the trajectories; numerator only, no gradient, not in m.
        log_z: -m of every prompt where it is known better than from this tree; a learned value receives its
            gradient (trajectory balance).
        coefficients: of these trajectories, from `trajectory_coefficients` of the whole tree that this one is
            a part of. The losses of all parts add up to the whole's if log_z is also that of the whole
            wherever parts share a prompt.
        residual_loss, residual_limit: the cost of delta - m, see fastgfn.ops.residual. Only the square's
            gradient is the variance's; "clamped" gives trajectories beyond the limit no gradient at all.

    Raises:
        InputError: a shape disagrees, an unknown normalization or residual loss, weights beside coefficients.
    """
    ratio = target_ratio("vargrad_loss", log_probs, tree, log_reward)
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    return _balanced("vargrad_loss", tree, ratio, log_z, pooling, residual, log_probs.log_pf.dtype)


@phase("loss")
def relative_trajectory_balance_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    prior: LogProbs,
    beta: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,) or ()
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """Relative trajectory balance, O(T); zero where q is proportional to p_prior R^beta on what was drawn,
    which is R's posterior only for a uniform prior and beta = 1.

    loss = mean of (log_z + log q(x) - log p_prior(x) - beta log R(x))^2. Choose it where the target is a
    prior, e.g. the base model, reweighted by a reward such as a classifier's.
    Venkatraman et al. 2024 (arXiv:2405.20971), whose log Z is learned; None here is `vargrad_loss`'s mean.

    Args:
        prior: node-aligned log p of the prior under the same constraints,
            `score(tree, policy=policy.reference)`; no gradient.
        beta: of log_reward, which is already tempered.
        log_z: of p_prior R^beta: the log of the mean of R^beta over the prior.
        The others, raises: as `vargrad_loss`.
    """
    name = "relative_trajectory_balance_loss"
    fix = "pass score(tree, policy=policy.reference), or use vargrad_loss or trajectory_balance_loss"
    checks.check(prior is not None, name, "prior", "given", None, fix)
    ratio = target_ratio(name, log_probs, tree, log_reward, prior=prior, beta=beta)
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    return _balanced(name, tree, ratio, log_z, pooling, residual, log_probs.log_pf.dtype)


@phase("loss")
def length_normalized_trajectory_balance_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    prior: LogProbs | None = None,
    beta: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,) or ()
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """Length-normalised trajectory balance (FlowRL), O(T). Not R's posterior: zero where
    q(x) = p_prior(x) exp(m(x) (beta log R(x) - log_z)), m the actions of x, so that the reward counts once
    per token.

    loss = mean of (log_z + (log q(x) - log p_prior(x)) / m - beta log R(x))^2. Choose it for long sequences
    of bounded reward, where sums of log q drown it, and where the exact target does not matter.
    Zhu et al. 2025 (arXiv:2509.15207). What differs: log_z need not be learned, rewards are not normalised
    within the prompt, the stop is always one of the m actions, and importance weights are the caller's.

    Args:
        prior: node-aligned log p of the prior, `score(tree, policy=policy.reference)`; None leaves it out.
        beta: of log_reward, which is already tempered.
        The others, raises: as `vargrad_loss`.
    """
    name = "length_normalized_trajectory_balance_loss"
    options = dict(prior=prior, beta=beta, per_action=True)
    ratio = target_ratio(name, log_probs, tree, log_reward, **options)
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    return _balanced(name, tree, ratio, log_z, pooling, residual, log_probs.log_pf.dtype)


def target_ratio(
    name: str,
    log_probs: LogProbs,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    *,
    prior: LogProbs | None = None,
    beta: float = 1.0,
    per_action: bool = False,
) -> Tensor:
    """(N,) float64 beta log R(x) - (log q(x) - log p_prior(x)), the brackets over the number of actions (the
    stop is one) if per_action; differentiable in log_probs."""
    shape = (tree.num_nodes,)
    checks.check(beta > 0, name, "beta", "> 0", beta, "1 keeps log_reward as it is")
    checks.check_shape(name, "log_reward", log_reward, shape, "pass the result of log_reward(tree)")
    gain = log_q(log_probs, tree)
    if prior is not None:
        fix = "pass score(tree, policy=policy.reference)"
        checks.check_shape(name, "prior.log_pf", prior.log_pf, shape, fix)
        with torch.no_grad():
            base = log_q(prior, tree)
        gain = gain - base
    if per_action:
        actions = tree_cumsum((tree.role == Role.ACTION).long(), tree.parent)[tree.leaf]
        gain = gain / (actions + 1)
    return beta * log_reward.detach()[tree.leaf] - gain


def _balanced(
    name: str,
    tree: TokenTree,
    ratio: Tensor,  # (N,)
    log_z: Tensor | None,
    pooling: Pooling,
    residual: Residual,
    dtype: torch.dtype,
) -> Objective:
    check_normalization(name, pooling.normalization)
    check_inputs(name, tree, pooling, residual)
    estimate = group_mean(ratio.detach(), tree)
    log_z = known_log_z(name, tree, log_z, estimate).to(ratio)
    loss = (_coefficients(tree, pooling) * residual(log_z[tree.group[tree.leaf].long()] - ratio)).sum()
    return Objective(loss.to(dtype), estimate.to(dtype), ratio.detach())


def _coefficients(tree: TokenTree, pooling: Pooling) -> Tensor:
    if pooling.coefficients is not None:
        return pooling.coefficients
    return trajectory_coefficients(tree, normalization=pooling.normalization, weights=pooling.weights)
