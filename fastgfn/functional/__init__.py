"""The stable tensor-level API for other libraries; natural logarithms, batch first, padding never read."""

from fastgfn.functional.importance import importance_weights
from fastgfn.functional.interpolated import interpolated_log_reward, interpolated_subtb_loss
from fastgfn.functional.log_probs import linear_log_probs, log_probs_from_logits, policy_reward_log_probs
from fastgfn.functional.rooted import rooted_prefix_tb_loss, rooted_prefix_terms
from fastgfn.functional.sampling import sample_next, sample_next_from_hidden
from fastgfn.functional.subtb import (
    detailed_balance_loss,
    modified_detailed_balance_loss,
    modified_subtb_loss,
    subtb_loss,
    subtb_potential,
    termination_log_prob,
)
from fastgfn.functional.trajectory_balance import (
    relative_trajectory_balance_loss,
    trajectory_balance_loss,
    trajectory_balance_residual,
    vargrad_loss,
)
from fastgfn.functional.tree import build_tree
from fastgfn.ops.residual import residual_loss

__all__ = [
    "build_tree",
    "detailed_balance_loss",
    "importance_weights",
    "interpolated_log_reward",
    "interpolated_subtb_loss",
    "linear_log_probs",
    "log_probs_from_logits",
    "modified_detailed_balance_loss",
    "modified_subtb_loss",
    "policy_reward_log_probs",
    "relative_trajectory_balance_loss",
    "residual_loss",
    "rooted_prefix_tb_loss",
    "rooted_prefix_terms",
    "sample_next",
    "sample_next_from_hidden",
    "subtb_loss",
    "subtb_potential",
    "termination_log_prob",
    "trajectory_balance_loss",
    "trajectory_balance_residual",
    "vargrad_loss",
]
