"""The reliability diagram."""

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attn.analysis.figures import new_figure

from .errors import expected_calibration_error, reliability_bins


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_reliability(probabilities: Any, labels: Any, num_bins: int = 10, title: str | None = None) -> "Figure":
    """Draw how often predictions are right over how sure they are, and how many there are.

    Args:
        probabilities: `(samples, classes)`.
        labels: `(samples,)`.
        num_bins: bins of equal width.
        title: title of the figure.

    Returns:
        A matplotlib figure; `figure.savefig("reliability.png")` writes it.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    figure = new_figure(4.5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres, width = (bins.edges[:-1] + bins.edges[1:]) / 2, 1 / num_bins
    there = bins.counts > 0
    upper.bar(centres[there], bins.accuracies[there], 0.95 * width, color="tab:blue", label="accuracy")
    upper.plot(
        bins.confidences[there], bins.accuracies[there], "o", color="black", markersize=4, label="mean confidence"
    )
    upper.plot([0, 1], [0, 1], "--", color="gray", label="perfectly calibrated")
    ece = expected_calibration_error(probabilities, labels, num_bins)
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title=title or f"ECE {ece:.3f}, {np.sum(bins.counts)} predictions")
    upper.legend(loc="upper left", frameon=False)
    lower.bar(centres, bins.counts, 0.95 * width, color="tab:gray")
    lower.set(xlabel="confidence", ylabel="predictions", xlim=(0, 1))
    return figure
