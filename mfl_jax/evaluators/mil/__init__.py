"""Slides as bags of tile features: heads trained in nested folds, all fits of a head as one program."""

from mfl_jax.evaluators.mil.fit import Settings
from mfl_jax.evaluators.mil.folds import Fold, nested, read_splits
from mfl_jax.evaluators.mil.run import Arm, Study, attention, spread, study, top_mean

__all__ = ["Arm", "Fold", "Settings", "Study"]
__all__ += ["attention", "nested", "read_splits", "spread", "study", "top_mean"]
