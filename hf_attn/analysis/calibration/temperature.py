"""Temperature scaling: one number that makes the probabilities of a trained classifier believable."""

from typing import Any

import numpy as np

from .errors import check_probabilities
from .metrics import softmax


def fit_temperature(logits: Any, labels: Any, smallest: float = 1e-2, largest: float = 1e2) -> float:
    """The temperature T for which `softmax(logits / T)` has the least cross entropy (Guo et al., 2017).

    Fit it on validation data, not on those that the classifier was trained on. It changes no prediction.

    Args:
        logits: `(samples, classes)`.
        labels: `(samples,)`.
        smallest: least temperature; reached if every prediction is right, when no temperature is low enough.
        largest: largest temperature; reached if the logits say nothing about the labels.

    Returns:
        T; more than 1 if the classifier is too sure of itself.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("Logits must be finite.")
    _, labels = check_probabilities(softmax(logits), labels)
    own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def slope(inverse: float) -> float:
        # Derivative of the cross entropy, which is convex in 1 / T.
        return float(((softmax(logits * inverse) * logits).sum(1) - own).mean())

    low, high = 1 / largest, 1 / smallest
    if slope(low) >= 0:
        return largest
    if slope(high) <= 0:
        return smallest
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low * high) ** -0.5
