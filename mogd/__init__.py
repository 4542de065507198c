"""Unbiased multi-gradient optimisation: several losses, one step, no hand-tuned weights."""

from mogd.bisector_projection import BisectorProjection
from mogd.optimizer import UnbiasedMultiGradient
from mogd.priority import Fixed, Priority, Threshold
from mogd.record import Record
from mogd.rules import Constant, GramianRule, Rule, Weighting

__version__ = "0.1.0"

__all__ = [
    "BisectorProjection",
    "Constant",
    "Fixed",
    "GramianRule",
    "Priority",
    "Record",
    "Rule",
    "Threshold",
    "UnbiasedMultiGradient",
    "Weighting",
]
