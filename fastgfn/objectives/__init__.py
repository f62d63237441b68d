"""Stage 4: LogProbs and log R -> loss, on the nodes of the tree.

subtb: balance of every prefix of a trajectory with every other, of neighbours alone, with and without flows.
trajectory: balance of whole trajectories, for rewards of whole ones.
prefixes: rewards of prefixes that depend on the trajectory: rooted at s_0, interpolated.
registry: all of them by name, with what they read.
"""

from fastgfn.objectives.pooling import Objective, group_mean, log_q, log_ratio, trajectory_coefficients
from fastgfn.objectives.prefixes import interpolated_subtb_loss, rooted_prefix_tb_loss
from fastgfn.objectives.registry import REGISTRY, Spec
from fastgfn.objectives.subtb import (
    detailed_balance_loss,
    modified_detailed_balance_loss,
    modified_subtb_loss,
    subtb_loss,
)
from fastgfn.objectives.trajectory import (
    length_normalized_trajectory_balance_loss,
    relative_trajectory_balance_loss,
    trajectory_balance_loss,
    vargrad_loss,
)
from fastgfn.objectives.windows import flow_coefficients, has_anchor, window_coefficients

__all__ = [
    "REGISTRY",
    "Objective",
    "Spec",
    "detailed_balance_loss",
    "flow_coefficients",
    "group_mean",
    "has_anchor",
    "interpolated_subtb_loss",
    "length_normalized_trajectory_balance_loss",
    "log_q",
    "log_ratio",
    "modified_detailed_balance_loss",
    "modified_subtb_loss",
    "relative_trajectory_balance_loss",
    "rooted_prefix_tb_loss",
    "subtb_loss",
    "trajectory_balance_loss",
    "trajectory_coefficients",
    "vargrad_loss",
    "window_coefficients",
]
