"""Stage 4: LogProbs and log R -> loss, on the nodes of the tree.

subtb: balance of every prefix of a trajectory with every other.
trajectory: balance of whole trajectories of a prompt with each other, for rewards of whole ones.
"""

from fastgfn.objectives.pooling import (
    Objective,
    group_mean,
    has_anchor,
    log_ratio,
    trajectory_coefficients,
    window_coefficients,
)
from fastgfn.objectives.subtb import modified_subtb_loss
from fastgfn.objectives.trajectory import vargrad_loss

__all__ = [
    "Objective",
    "group_mean",
    "has_anchor",
    "log_ratio",
    "modified_subtb_loss",
    "trajectory_coefficients",
    "vargrad_loss",
    "window_coefficients",
]
