"""What a sampler has learned.

exact.py        exact distances on enumerable sequence sets
samples.py      `Target`: sampler and target; the samples that the estimators below read
annealing.py    the annealing path, its Metropolis move
bounds.py       estimates of log Z and bounds on it
diagnostics.py  effective sample size, variances, termination, survival, temperature sweeps, staleness
"""

from fastgfn.evaluate.bounds import Bounds, bounds, effective_sample_size, log_z_ais, log_z_importance
from fastgfn.evaluate.diagnostics import (
    Diagnostics,
    Staleness,
    Survival,
    TemperatureSweep,
    Termination,
    diagnose,
    log_ratio_variance,
    prefix_survival,
    staleness,
    survival,
    temperature_sweep,
    termination,
)
from fastgfn.evaluate.exact import Divergence, divergence, evaluate_temperatures, sequence_log_probs
from fastgfn.evaluate.samples import Samples, Target, draw_exact, measure

__all__ = [
    "Bounds",
    "Diagnostics",
    "Divergence",
    "Samples",
    "Staleness",
    "Survival",
    "Target",
    "TemperatureSweep",
    "Termination",
    "bounds",
    "diagnose",
    "divergence",
    "draw_exact",
    "effective_sample_size",
    "evaluate_temperatures",
    "log_ratio_variance",
    "log_z_ais",
    "log_z_importance",
    "measure",
    "prefix_survival",
    "sequence_log_probs",
    "staleness",
    "survival",
    "temperature_sweep",
    "termination",
]
