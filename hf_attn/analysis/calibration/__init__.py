"""Calibration of a classifier's probabilities: errors, the reliability diagram, and temperature scaling."""

from .errors import (
    ReliabilityBins,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    reliability_bins,
)
from .metrics import ClassificationMetrics
from .plots import plot_reliability
from .temperature import fit_temperature


__all__ = [
    "ClassificationMetrics",
    "ReliabilityBins",
    "adaptive_calibration_error",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "plot_reliability",
    "reliability_bins",
]
