"""Calibration errors of predicted probabilities."""

from dataclasses import dataclass
from typing import Any

import numpy as np


def check_probabilities(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(samples, classes)` in float64 and labels `(samples,)`.

    Raises:
        ValueError: for invalid input.
    """
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            "Probabilities must have the shape (samples, classes) with at least two classes, got "
            f"{probabilities.shape}."
        )
    if labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"There must be at least one sample, and one label per sample; got {labels.shape} labels for "
            f"{probabilities.shape} probabilities."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Labels must be integers, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"Labels must lie between 0 and {probabilities.shape[1] - 1}, got {labels.min()} to {labels.max()}."
        )
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0):
        raise ValueError("Probabilities must be finite and not negative. If these are logits, apply a softmax first.")
    if not np.allclose(probabilities.sum(1), 1, atol=1e-3):
        raise ValueError("The probabilities of each sample must sum to 1. If these are logits, apply a softmax first.")
    return probabilities, labels


@dataclass(frozen=True)
class ReliabilityBins:
    """Predictions by their confidence, the probability of the class that is predicted.

    Attributes:
        edges: `(bins + 1,)`; a bin does not contain its lower edge.
        counts: `(bins,)`, predictions in each.
        confidences: `(bins,)`, their mean confidence, NaN in an empty bin.
        accuracies: `(bins,)`, how many of them are right, NaN in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray


def reliability_bins(probabilities: Any, labels: Any, num_bins: int = 10) -> ReliabilityBins:
    """Sort predictions into bins of equal width.

    Args:
        probabilities: `(samples, classes)`.
        labels: `(samples,)`.
        num_bins: number of bins.
    """
    probabilities, labels = check_probabilities(probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    edges = np.linspace(0, 1, num_bins + 1)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    # The first edge above or at the confidence; a sum that is rounded above 1 is 1.
    index = np.searchsorted(edges, np.minimum(confidence, 1), side="left") - 1
    counts = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidences = np.bincount(index, confidence, num_bins) / counts
        accuracies = np.bincount(index, right, num_bins) / counts
    return ReliabilityBins(edges, counts, confidences, accuracies)


def expected_calibration_error(probabilities: Any, labels: Any, num_bins: int = 10) -> float:
    """ECE: mean distance of confidence and accuracy over bins of equal width, weighted by their predictions.

    See [`reliability_bins`] for the arguments.
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    there = bins.counts > 0
    gaps = np.abs(bins.accuracies - bins.confidences)[there]
    return float((bins.counts[there] * gaps).sum() / bins.counts.sum())


def adaptive_calibration_error(probabilities: Any, labels: Any, num_ranges: int = 10) -> float:
    """ACE (Nixon et al., 2019): the same over ranges of equally many samples, for every class, all with equal weight.

    Args:
        probabilities: `(samples, classes)`.
        labels: `(samples,)`.
        num_ranges: number of ranges of each class; with fewer samples some are empty and are ignored.
    """
    probabilities, labels = check_probabilities(probabilities, labels)
    if num_ranges < 1:
        raise ValueError(f"num_ranges must be at least 1, got {num_ranges}.")
    gaps = []
    for label, column in enumerate(probabilities.T):
        order = np.argsort(column, kind="stable")
        for part in np.array_split(order, num_ranges):
            if len(part):
                gaps.append(abs((labels[part] == label).mean() - column[part].mean()))
    return float(np.mean(gaps))


def brier_score(probabilities: Any, labels: Any) -> float:
    """Mean over samples of the squared errors of all classes, between 0 and 2."""
    probabilities, labels = check_probabilities(probabilities, labels)
    wanted = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - wanted).sum(1).mean())
