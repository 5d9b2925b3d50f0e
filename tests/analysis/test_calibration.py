"""Calibration: the values of the metrics, and their use in Trainer."""

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_attn.analysis.calibration import (
    ClassificationMetrics,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    plot_reliability,
    reliability_bins,
)
from hf_attn.analysis.calibration.metrics import softmax


LABELS = np.array([0, 1, 1, 0, 1])


@pytest.fixture
def overconfident():
    """Logits that are three times too large for the accuracy of their labels."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3))
    labels = np.array([generator.choice(3, p=row) for row in softmax(logits)])
    return 3 * logits, labels


def test_a_sure_and_right_classifier_has_no_error():
    probabilities = np.eye(2)[LABELS]
    assert expected_calibration_error(probabilities, LABELS) == 0
    assert adaptive_calibration_error(probabilities, LABELS) == 0
    assert brier_score(probabilities, LABELS) == 0
    assert brier_score(np.full((5, 2), 0.5), LABELS) == 0.5


def test_bins_do_not_contain_their_lower_edge():
    bins = reliability_bins([[0.5, 0.5], [0.4, 0.6], [0.39, 0.61], [0, 1.0]], [0, 1, 0, 1])
    assert bins.counts.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1]
    assert bins.accuracies[[4, 5, 6, 9]].tolist() == [1, 1, 0, 1]
    assert np.isnan(bins.confidences[0])


def test_metrics_of_a_trainer():
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    metrics = ClassificationMetrics()(EvalPrediction(predictions=logits, label_ids=LABELS))
    assert metrics["accuracy"] == pytest.approx(0.6)
    for name in ("precision", "recall", "f1"):
        assert metrics[name] == pytest.approx(2 / 3)
    assert metrics["specificity"] == 0.5
    assert metrics["ece"] == pytest.approx((0.2 + 0.6 + 0.7 + 0.1 + 0.1) / 5, abs=0.2)
    swapped = ClassificationMetrics(positive_label=0)(EvalPrediction(predictions=logits, label_ids=LABELS))
    assert swapped["recall"] == metrics["specificity"]


def test_a_single_class_gives_a_warning():
    with pytest.warns(UserWarning, match="specificity"):
        metrics = ClassificationMetrics().compute(np.full((3, 2), [0.4, 0.6]), np.ones(3, dtype=int))
    assert np.isnan(metrics["specificity"]) and metrics["recall"] == 1
    with pytest.warns(UserWarning, match="precision"):
        metrics = ClassificationMetrics().compute(np.full((3, 2), [0.6, 0.4]), np.array([0, 0, 1]))
    assert metrics["recall"] == 0 and metrics["f1"] == 0


def test_temperature_repairs_confidence(overconfident):
    logits, labels = overconfident
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(3, rel=0.1)
    before, after = (expected_calibration_error(softmax(logits / t), labels) for t in (1, temperature))
    assert after < 0.2 * before


def test_temperature_has_limits():
    sure = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(sure, [0, 1]) == 0.01
    assert fit_temperature(sure, [1, 0]) == 100
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(sure * np.nan, [0, 1])


def test_the_diagram_shows_the_bins(overconfident):
    pytest.importorskip("matplotlib")
    logits, labels = overconfident
    figure = plot_reliability(softmax(logits), labels, num_bins=5)
    upper, lower = figure.axes
    bins = reliability_bins(softmax(logits), labels, 5)
    assert [bar.get_height() for bar in lower.patches] == bins.counts.tolist()
    assert [bar.get_height() for bar in upper.patches] == bins.accuracies[bins.counts > 0].tolist()


@pytest.mark.parametrize(
    ("probabilities", "labels", "problem"),
    [
        ([[0.5, 0.6]], [0], "sum 1"),
        ([[-1.0, 2.0]], [0], "logits"),
        ([[0.5, 0.5]], [2], "between 0 and 1"),
        ([[0.5, 0.5]], [0, 1], "one label"),
        ([[0.5, 0.5]], [0.5], "whole numbers"),
        ([0.5, 0.5], [0, 1], "two classes"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), "at least one"),
    ],
)
def test_bad_input(probabilities, labels, problem):
    with pytest.raises(ValueError, match=problem):
        expected_calibration_error(probabilities, labels)
