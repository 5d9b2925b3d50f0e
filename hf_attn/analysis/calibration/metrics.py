"""Performance and calibration of a classifier as `compute_metrics` of a Trainer."""

import warnings
from typing import Any

import numpy as np

from .errors import adaptive_calibration_error, brier_score, check_probabilities, expected_calibration_error


class ClassificationMetrics:
    """Accuracy, precision, recall, F1, specificity, ECE, ACE and Brier score of a classifier.

        Trainer(..., compute_metrics=ClassificationMetrics())

    Args:
        positive_label: the class that precision, recall, F1 and specificity are about.
        num_bins: bins of ECE, ranges of ACE.

    Metrics of a class without samples, or that is never predicted, are undefined: they are NaN, with a warning.
    """

    def __init__(self, positive_label: int = 1, num_bins: int = 10):
        self.positive_label = positive_label
        self.num_bins = num_bins

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Measure an `EvalPrediction` with logits `(samples, classes)`."""
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        labels = prediction.label_ids
        return self.compute(softmax(logits), labels[0] if isinstance(labels, tuple) else labels)

    def compute(self, probabilities: Any, labels: Any) -> dict[str, float]:
        """Measure.

        Args:
            probabilities: `(samples, classes)`.
            labels: `(samples,)`.
        """
        probabilities, labels = check_probabilities(probabilities, labels)
        if not 0 <= self.positive_label < probabilities.shape[1]:
            raise ValueError(
                f"positive_label={self.positive_label} is out of range: there are {probabilities.shape[1]} classes."
            )
        found = probabilities.argmax(1)
        positive, predicted = labels == self.positive_label, found == self.positive_label
        true_positive = (positive & predicted).sum()
        metrics = {
            "accuracy": float((found == labels).mean()),
            "precision": _share(true_positive, predicted.sum()),
            "recall": _share(true_positive, positive.sum()),
            "f1": _share(2 * true_positive, positive.sum() + predicted.sum()),
            "specificity": _share((~positive & ~predicted).sum(), (~positive).sum()),
            "ece": expected_calibration_error(probabilities, labels, self.num_bins),
            "ace": adaptive_calibration_error(probabilities, labels, self.num_bins),
            "brier": brier_score(probabilities, labels),
        }
        undefined = [name for name, value in metrics.items() if np.isnan(value)]
        if undefined:
            warnings.warn(
                f"Undefined, reported as NaN: {', '.join(undefined)}. Of {len(labels)} samples {positive.sum()} have "
                f"class {self.positive_label}, and {predicted.sum()} are predicted to have it.",
                stacklevel=2,
            )
        return metrics


def softmax(logits: Any) -> np.ndarray:
    """Probabilities of logits `(samples, classes)`, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
