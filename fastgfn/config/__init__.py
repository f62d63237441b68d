"""Settings, validated once when they are made; unknown keys are refused.

settings.py   what all of them share: types, errors, mappings, linear schedules
behavior.py   `Behavior`: which trajectories a step trains on
objective.py  what is minimised
train.py      `TrainConfig`: these and the optimiser
"""

from fastgfn.config.behavior import Behavior
from fastgfn.config.objective import LOG_Z, OBJECTIVES, RESIDUAL_LOSSES
from fastgfn.config.train import TrainConfig

__all__ = ["Behavior", "LOG_Z", "OBJECTIVES", "RESIDUAL_LOSSES", "TrainConfig"]
