"""Evaluates a model on trials as the paper does: one greedy scanpath, the mean of many samples, and teacher forcing."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.utils import logging

from hf_attn.analysis.scanpaths import (
    ScanpathMetrics,
    fixation_map,
    multimatch,
    normalized_scanpath_saliency,
    object_similarity,
)

from .modeling_oat import OATForScanpathPrediction
from .processing_oat import collate_scenes
from .trials import ScanpathDataset, Trial


@torch.no_grad()
def predict_scanpaths(
    model: OATForScanpathPrediction, dataset: ScanpathDataset, num_samples: int | None = None, **generate_kwargs
) -> list[list[list[int]]]:
    """Scanpaths of each trial: the greedy one, or samples. Trials of one image and target share them.

    Args:
        model: the model, in eval mode.
        dataset: the trials.
        num_samples: number of samples; the greedy scanpath if not given.
        generate_kwargs: further arguments of `generate`.
    """
    if num_samples is not None:
        generate_kwargs |= {"do_sample": True, "num_return_sequences": num_samples}
    known: dict[tuple[str, int], list[list[int]]] = {}
    for index, trial in enumerate(logging.tqdm(dataset.trials, unit="trial", desc="scanpaths")):
        key = (trial.image_id, trial.target_index)
        if key not in known:
            inputs = collate_scenes([dataset[index]])
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
            ids = model.generate(**inputs, **generate_kwargs)
            known[key] = dataset.processor.post_process_scanpaths(ids, inputs)[0]
    return [known[trial.image_id, trial.target_index] for trial in dataset.trials]


@torch.no_grad()
def teacher_forced_similarity(model: OATForScanpathPrediction, dataset: ScanpathDataset) -> float:
    """SIM: the mean probability of the next fixation, or of stopping, given the true ones so far."""
    probabilities, steps = [], 0
    for index in range(len(dataset)):
        inputs = {name: tensor.to(model.device) for name, tensor in collate_scenes([dataset[index]]).items()}
        scores = model(**inputs).logits[0].float().softmax(-1).cpu().numpy()
        labels = inputs["labels"][0].cpu().numpy()
        probabilities.append(len(labels) * object_similarity(scores, labels))
        steps += len(labels)
    return sum(probabilities) / steps


def evaluate_predictions(trials: Sequence[Trial], predictions: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """Metrics of predicted scanpaths, several of each trial; all but NSS, which has one map of them, are means over them.

    Returns:
        What [`hf_attn.analysis.scanpaths.ScanpathMetrics`] returns, the four similarities of MultiMatch, and NSS of the
        fixations that are on the image (not a number if the predictions have none).
    """
    targets = [trial.target_index for trial in trials]
    truths = [trial.scanpath for trial in trials]
    repeats = [
        (prediction, truth, target)
        for prediction_list, truth, target in zip(predictions, truths, targets, strict=True)
        for prediction in prediction_list
    ]
    metrics = ScanpathMetrics().compute(*(list(column) for column in zip(*repeats, strict=True)))
    matches, saliencies = [], []
    for trial, scanpaths in zip(trials, predictions, strict=True):
        screen = _screen(trial)
        points = [trial.centres(scanpath) for scanpath in scanpaths]
        matches += [multimatch(some, trial.fixations, screen) for some in points if len(some)]
        fixations = trial.fixations[((trial.fixations >= 0) & (trial.fixations < screen)).all(1)]
        if len(fixations) and any(len(some) for some in points):
            saliency = fixation_map(np.concatenate(points), screen)
            saliencies.append(normalized_scanpath_saliency(saliency, fixations))
    names = ("vector", "direction", "length", "position")
    means = np.mean(matches, axis=0) if matches else np.full(4, np.nan)
    metrics |= {f"multimatch_{name}": float(value) for name, value in zip(names, means, strict=True)}
    return metrics | {"nss": float(np.mean(saliencies)) if saliencies else float("nan")}


def _screen(trial: Trial) -> tuple[int, int]:
    """Width and height of the area from the upper left corner of the image that contains all boxes."""
    width, height = (
        trial.boxes[:, 2:].max(0).values.ceil().int().tolist()
        if trial.boxes.is_floating_point()
        else (trial.boxes[:, 2:].max(0).values.tolist())
    )
    return width, height


def baseline_predictions(
    trials: Sequence[Trial], baseline: Callable[[Trial], list[int]], num_samples: int
) -> list[list[list[int]]]:
    """Scanpaths of a baseline, several of each trial."""
    return [[baseline(trial) for _ in range(num_samples)] for trial in trials]
