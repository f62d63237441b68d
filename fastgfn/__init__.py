"""GFlowNet fine-tuning of large language models: sample from intractable posteriors, fast.

The road: prompts -> sample -> pack -> score / log_reward -> modified_subtb_loss (or another of
fastgfn.objectives) -> optimiser step. `Trainer` runs it, `score_and_reward` is the two in the middle for one
head pass, and `fastgfn.functional` is the tensor-level API for other libraries.
"""

from fastgfn.config import Behavior, TrainConfig
from fastgfn.models import Policy, load_policy
from fastgfn.objectives import (
    detailed_balance_loss,
    interpolated_subtb_loss,
    length_normalized_trajectory_balance_loss,
    modified_detailed_balance_loss,
    modified_subtb_loss,
    relative_trajectory_balance_loss,
    rooted_prefix_tb_loss,
    subtb_loss,
    trajectory_balance_loss,
    vargrad_loss,
)
from fastgfn.ops.backends import backend_info
from fastgfn.packing import pack
from fastgfn.passes import score_and_reward
from fastgfn.replay import ReplayBuffer
from fastgfn.rewards import LMReward, ProductReward, SequenceReward, log_reward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.train import Trainer
from fastgfn.types import Constraints, LogProbs, Rollouts, TokenTree

__version__ = "0.1.0"

__all__ = [
    "Behavior",
    "Constraints",
    "LMReward",
    "LogProbs",
    "Policy",
    "ProductReward",
    "ReplayBuffer",
    "Rollouts",
    "SequenceReward",
    "TokenTree",
    "TrainConfig",
    "Trainer",
    "backend_info",
    "detailed_balance_loss",
    "interpolated_subtb_loss",
    "length_normalized_trajectory_balance_loss",
    "load_policy",
    "log_reward",
    "modified_detailed_balance_loss",
    "modified_subtb_loss",
    "pack",
    "relative_trajectory_balance_loss",
    "rooted_prefix_tb_loss",
    "sample",
    "score",
    "score_and_reward",
    "subtb_loss",
    "trajectory_balance_loss",
    "vargrad_loss",
]
