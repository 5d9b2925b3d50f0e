"""The measures as `compute_metrics` of a Trainer."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .behaviour import MEASURES, behaviour, behavioural_distance
from .sequences import edit_distance, sequence_score


class ScanpathMetrics:
    """`compute_metrics` for predicted scanpaths.

        Trainer(..., compute_metrics=ScanpathMetrics())

    Returns `delta`, `sequence_score`, `edit_distance`, and of the predictions the averages `found`, `length`, `search`,
    `refixation` and `revisit`. A prediction without fixations has the behaviour 0 throughout.
    """

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Compute the metrics of an evaluation.

        Args:
            prediction: transformers' `EvalPrediction`; `predictions` `(trials, length)`, objects with negative numbers as filler,
                and `label_ids`, a pair of such an array and the targets `(trials,)`.
        """
        truths, targets = prediction.label_ids
        return self.compute(_rows(prediction.predictions), _rows(truths), np.asarray(targets).tolist())

    def compute(
        self, predictions: Sequence[Sequence[int]], truths: Sequence[Sequence[int]], targets: Sequence[int]
    ) -> dict[str, float]:
        """Compute the metrics of scanpaths, a trial each.

        Raises:
            ValueError: if there are no trials, their numbers differ, or a person's scanpath is empty.
        """
        if not len(predictions) == len(truths) == len(targets) or not len(targets):
            raise ValueError(
                f"There are {len(predictions)} predictions, {len(truths)} human scanpaths and {len(targets)} targets; "
                "each trial needs one of each."
            )
        pairs = list(zip(predictions, truths, strict=True))
        model = np.array([_behaviour(*trial) for trial in zip(predictions, targets, strict=True)])
        people = [behaviour(*trial) for trial in zip(truths, targets, strict=True)]
        return {
            "delta": behavioural_distance(model, people),
            "sequence_score": float(np.mean([sequence_score(*pair) for pair in pairs])),
            "edit_distance": float(np.mean([edit_distance(*pair) for pair in pairs])),
            **{name: float(value) for name, value in zip(MEASURES, model.mean(0), strict=True)},
        }


def _behaviour(scanpath: Sequence[int], target: int) -> np.ndarray:
    return behaviour(scanpath, target) if len(scanpath) else np.zeros(len(MEASURES))


def _rows(filled: np.ndarray) -> list[list[int]]:
    return [[index for index in row if index >= 0] for row in _integers(filled)]


def _integers(filled: np.ndarray) -> Iterable[list[int]]:
    return np.asarray(filled).astype(int).tolist()
