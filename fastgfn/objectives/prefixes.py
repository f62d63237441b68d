"""Objectives in which the target of a prefix depends on the trajectory, so that nothing is shared: the padded
ones of fastgfn.functional on the rows of the trajectories, pooled as on the tree.
"""

import torch
from torch import Tensor

from fastgfn import functional
from fastgfn.objectives.pooling import (
    Objective,
    Pooling,
    Residual,
    check_inputs,
    check_normalization,
    group_mean,
    known_log_z,
    log_ratio,
    trajectory_coefficients,
)
from fastgfn.objectives.windows import coefficients_of, stop_states
from fastgfn.ops.scan import tree_cumsum
from fastgfn.ops.tree import gather_nodes, path_nodes
from fastgfn.phases import phase
from fastgfn.types import LogProbs, TokenTree


@phase("loss")
def rooted_prefix_tb_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    prior: LogProbs | None = None,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,) or ()
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
    **settings,
) -> Objective:
    """Rooted-prefix trajectory balance (RapTB), O(N L).

    loss = mean over trajectories of (log_z + U_n)^2 + eta sum_k w_k (U_k - U_0 + alpha_k (u_k - u_k^tgt))^2,
    U as of `modified_subtb_loss`, without a gradient to log q(stop | s_k) in the second term; U_0 = -log_z
    where s_0 cannot stop. Its fixed point is R's posterior where every prefix has a reward of its own
    (alpha = 0); with sparse rewards it is not, as the terms then contradict each other. Choose it for sparse
    rewards of long sequences, where the windows of SubTB drive the stop probabilities away and TB alone is
    slow.
    Wang et al. 2026 (arXiv:2603.00454). What differs: log_z may be estimated; see fastgfn.functional.rooted.

    Args:
        prior: node-aligned log p of the reference, `score(tree, policy=policy.reference)`, of which u takes
            settings["prior_scale"] times the log out of log R; None: u = log R.
        settings: prefix_weight (eta), k_min, k_max, subtb_lambda, gamma, max_share, soft_beta, soft_rho,
            missing_reward and tolerance, see fastgfn.functional.rooted.
        The others, raises: as `vargrad_loss`, but log_reward is read at every prefix. A "clamped" residual
            beyond the limit has no gradient, in either term.
    """
    name = "rooted_prefix_tb_loss"
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    check_normalization(name, normalization)
    check_inputs(name, tree, pooling, residual, log_reward=log_reward)
    if coefficients is None:
        coefficients = trajectory_coefficients(tree, normalization=normalization, weights=weights)
    if prior is not None:
        with torch.no_grad():
            settings["log_prior"] = gather_nodes(
                tree_cumsum(prior.log_pf, tree.parent) + prior.log_pterm, _rows(tree)
            )
    return _pooled(
        name,
        functional.rooted_prefix_tb_loss,
        log_probs,
        tree,
        log_reward,
        log_z,
        coefficients,
        residual,
        settings,
    )


@phase("loss")
def interpolated_subtb_loss(
    log_probs: LogProbs,
    *,
    tree: TokenTree,
    log_reward: Tensor,  # (T,)
    segment: int = 8,
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    log_z: Tensor | None = None,  # (G,) or ()
    coefficients: Tensor | None = None,  # (N,)
    residual_loss: str = "squared",
    residual_limit: float | None = None,
) -> Objective:
    """Interpolated SubTB (LaCoT), O(N L): `modified_subtb_loss` with log R true only at prefixes of a
    multiple of `segment` tokens, at the first that may stop and at the end of the trajectory, and linear
    between.

    Not R's posterior, unless log R is linear between these: a prefix is interpolated towards every
    trajectory through it, so that no q at all may have zero loss. Choose it where the reward of every
    prefix costs a forward of its own, and accept the bias.
    Sun et al. 2025 (LaCoT, arXiv:2510.23925). What differs: the tail is interpolated to the trajectory's own
    reward.

    Args:
        log_reward: (T,) tempered; read at the prefixes named above.
        segment: tokens, >= 1; 1 is `modified_subtb_loss`.
        The others, raises: as `modified_subtb_loss`, with its `window_coefficients`.
    """
    name = "interpolated_subtb_loss"
    pooling, residual = Pooling(normalization, weights, coefficients), Residual(residual_loss, residual_limit)
    check_inputs(name, tree, pooling, residual, log_reward=log_reward)
    coefficients = coefficients_of(name, tree, stop_states(tree), subtb_lambda, pooling)
    settings = dict(segment=segment, subtb_lambda=subtb_lambda)
    return _pooled(
        name,
        functional.interpolated_subtb_loss,
        log_probs,
        tree,
        log_reward,
        log_z,
        coefficients,
        residual,
        settings,
    )


def _rows(tree: TokenTree) -> Tensor:
    """(N, L + 1) nodes of s_0 and every token of each trajectory, -1 past its end."""
    length = tree.length[tree.leaf].long()
    return path_nodes(tree.parent, tree.leaf, length + 1, tree.constraints.max_length + 1)


def _pooled(
    name: str,
    loss_of,
    log_probs: LogProbs,
    tree: TokenTree,
    log_reward: Tensor,
    log_z: Tensor | None,
    coefficients: Tensor,
    residual: Residual,
    settings: dict,
) -> Objective:
    """The sum over trajectories of their coefficients times a padded loss."""
    nodes, ratio = _rows(tree), log_ratio(log_probs, tree, log_reward)
    estimate = group_mean(ratio, tree)
    log_z = known_log_z(name, tree, log_z, estimate)[tree.group[tree.leaf].long()]
    dtype = log_probs.log_pf.dtype
    losses = loss_of(
        gather_nodes(log_probs.log_pf, nodes[:, 1:].contiguous()),
        gather_nodes(log_probs.log_pterm, nodes),
        gather_nodes(log_reward.detach().to(dtype), nodes),
        tree.length[tree.leaf],
        log_z=log_z,
        terminable=tree.terminable[nodes.clamp(min=0)] & (nodes >= 0),
        weights=coefficients,
        reduction="none",
        loss=residual.loss,
        residual_limit=residual.limit,
        **settings,
    )
    return Objective(losses.sum().to(dtype), estimate.to(dtype), ratio)
