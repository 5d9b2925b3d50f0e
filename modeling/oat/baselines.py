"""Searches without learning, to compare a model with."""

import numpy as np

from .processing_oat import OATImageProcessor
from .trials import Trial


def random_walk(trial: Trial, max_length: int, generator: np.random.Generator) -> list[int]:
    """Walks to a random neighbour (up to eight), from the object in the centre of the image, until the target or `max_length`."""
    centres = trial.centres(range(len(trial.boxes)))
    sizes = np.median((trial.boxes[:, 2:] - trial.boxes[:, :2]).numpy(), axis=0)
    middle = (centres.min(0) + centres.max(0)) / 2
    scanpath = [int(np.linalg.norm((centres - middle) / sizes, axis=1).argmin())]
    while scanpath[-1] != trial.target_index and len(scanpath) < max_length:
        distances = np.abs((centres - centres[scanpath[-1]]) / sizes).max(1)
        distances[scanpath[-1]] = np.inf
        neighbours = np.flatnonzero(distances < max(1.5, distances.min() + 0.5))
        scanpath.append(int(generator.choice(neighbours)))
    return scanpath


def saliency_walk(
    trial: Trial, max_length: int, generator: np.random.Generator, processor: OATImageProcessor
) -> list[int]:
    """Draws objects by their contrast and does not return, until the target or `max_length`.

    The contrast of an object is the distance of its mean colour from that of the scene, over their spread, as in bottom-up models
    that do not know the target.
    """
    crops = processor.crop(processor.read_image(trial.image), trial.boxes.round().long())
    colours = crops.mean((2, 3)).double().numpy()
    contrast = np.linalg.norm(colours - colours.mean(0), axis=1)
    weights = np.exp(contrast / max(contrast.std(), 1e-6))
    scanpath: list[int] = []
    while len(scanpath) < min(max_length, len(weights)):
        scanpath.append(int(generator.choice(len(weights), p=weights / weights.sum())))
        if scanpath[-1] == trial.target_index:
            break
        weights[scanpath[-1]] = 0
    return scanpath
