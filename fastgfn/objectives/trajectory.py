"""Balance of whole trajectories, for rewards of whole ones too."""

from torch import Tensor

from fastgfn.objectives.pooling import (
    Objective,
    check_inputs,
    check_log_z,
    check_normalization,
    group_mean,
    log_excess,
    trajectory_coefficients,
)
from fastgfn.phases import phase
from fastgfn.types import LogProbs, TokenTree


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
) -> Objective:
    """VarGrad on a token tree: the variance of log q(x) - log R(x) over each prompt's trajectories, O(T);
    zero exactly when q is proportional to R on what was drawn.

    With delta = log q(x) - log R(x), every action and the final stop in it, and m the mean of delta over the
    n trajectories of the prompt, under this policy and detached,
        loss = mean over prompts of 1/n sum over trajectories of (delta - m)^2.
    Deviations from a mean add up to 0, so that m needs no gradient: this one is exactly that of the variance,
    and n / (n - 1) times it that of its unbiased estimate. Minus m estimates log Z(X), which nobody has to
    learn. A prompt with a single trajectory adds nothing.

    Richter et al. 2020 (arXiv:2010.10436), Zhang et al. 2023 (arXiv:2302.05446).

    Args:
        log_probs: node-aligned, from `score`.
        log_reward: (T,) log R / T_reward, already tempered; read only where a trajectory stops.
        normalization: a mean per prompt, then over prompts ("group"); "batch" and "trajectory" are the mean
            over all trajectories.
        weights: importance weights of the trajectories; numerator only, no gradient, not in m.
        log_z: -m of every prompt where it is known better than from this tree; a learned value receives its
            gradient (trajectory balance).
        coefficients: of these trajectories, from `trajectory_coefficients` of the whole tree that this one is
            a part of. The losses of all parts add up to the whole's if log_z is also that of the whole
            wherever parts share a prompt.

    Raises:
        InputError: a shape disagrees, an unknown normalization, weights beside coefficients.
    """
    name = "vargrad_loss"
    check_normalization(name, normalization)
    if coefficients is None:
        coefficients = trajectory_coefficients(tree, normalization=normalization, weights=weights)
        weights = None
    check_inputs(name, tree, log_reward, coefficients, weights)
    delta = log_excess(log_probs, tree, log_reward.detach())
    estimate = group_mean(-delta.detach(), tree)
    log_z = estimate if log_z is None else log_z
    check_log_z(name, tree, log_z)
    residual = delta + log_z.to(delta)[tree.group[tree.leaf].long()]
    loss = (coefficients.to(delta) * residual.square()).sum()
    return Objective(loss=loss.to(log_probs.log_pf.dtype), log_z=estimate.to(log_probs.log_pf.dtype))
