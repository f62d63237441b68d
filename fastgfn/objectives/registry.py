"""The objectives by the names of TrainConfig.objective, and what each of them reads."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastgfn.objectives.pooling import Objective, trajectory_coefficients
from fastgfn.objectives.prefixes import interpolated_subtb_loss, rooted_prefix_tb_loss
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
from fastgfn.types import TokenTree


class Spec(NamedTuple):
    """What a step needs to know of an objective.

    loss: (log_probs, *, tree, log_reward, coefficients, log_z and prior if read, its options) -> Objective.
    coefficients: (tree, *, normalization, weights, those of its options that they depend on) -> (N,).
    pools_by: the names of these options.
    reads_log_z: whether the loss of this tree does.
    reads_prior, reads_flow: whether it does, on any tree.
    reads_prefixes: whether it reads log R of prefixes at which no trajectory stops.
    """

    loss: Callable[..., Objective]
    coefficients: Callable[..., Tensor]
    pools_by: tuple[str, ...] = ()
    reads_log_z: Callable[[TokenTree], bool] = lambda tree: True
    reads_prior: bool = False
    reads_flow: bool = False
    reads_prefixes: bool = False


def _neighbours(coefficients: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda tree, **options: coefficients(tree, subtb_lambda=0.0, **options)


_PREFIXES = dict(reads_log_z=has_anchor, reads_prefixes=True)
_FLOWS = dict(reads_log_z=lambda tree: False, reads_flow=True)

REGISTRY = {
    "modified_subtb": Spec(
        modified_subtb_loss, window_coefficients, ("subtb_lambda", "include_sink"), **_PREFIXES
    ),
    "modified_db": Spec(
        modified_detailed_balance_loss, _neighbours(window_coefficients), ("include_sink",), **_PREFIXES
    ),
    "subtb": Spec(subtb_loss, flow_coefficients, ("subtb_lambda",), **_FLOWS),
    "db": Spec(detailed_balance_loss, _neighbours(flow_coefficients), **_FLOWS),
    "tb": Spec(trajectory_balance_loss, trajectory_coefficients),
    "vargrad": Spec(vargrad_loss, trajectory_coefficients),
    "rtb": Spec(relative_trajectory_balance_loss, trajectory_coefficients, reads_prior=True),
    "length_normalized_tb": Spec(
        length_normalized_trajectory_balance_loss, trajectory_coefficients, reads_prior=True
    ),
    "rooted_prefix_tb": Spec(rooted_prefix_tb_loss, trajectory_coefficients, reads_prefixes=True),
    "interpolated_subtb": Spec(interpolated_subtb_loss, window_coefficients, ("subtb_lambda",), **_PREFIXES),
}
