"""Whether the probabilities of a classifier can be believed: calibration errors, their picture, and a remedy."""

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
