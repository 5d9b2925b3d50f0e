"""Accuracy of image classifiers, also among the five best classes, from logits that are reduced batch by batch."""

import datasets
import evaluate
import numpy as np
import torch


class TopAccuracy(evaluate.Metric):
    """Fraction of images whose class is the first, or among the first, of `predictions` `(images, classes)`, best first."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=datasets.Features(features))

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {"accuracy": hits[:, 0].mean().item(), "accuracy_top5": hits.any(axis=1).mean().item()}


def first_classes(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """The five classes with the highest logits, best first: all that is kept of an evaluation."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(5, logits.shape[-1])).indices
