"""Settings, validated once when they are made; unknown keys are refused.

settings.py  what all of them share: types, errors, mappings, linear schedules
behavior.py  `Behavior`: which trajectories a step trains on
train.py     `TrainConfig`: these, the objective and the optimiser
"""

from fastgfn.config.behavior import Behavior
from fastgfn.config.train import TrainConfig

__all__ = ["Behavior", "TrainConfig"]
