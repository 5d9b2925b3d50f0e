"""How well predictions meet the fixations themselves: SIM under teacher forcing, and NSS of a map of sampled fixations."""

from collections.abc import Sequence

import numpy as np


def object_similarity(probabilities: np.ndarray, next_objects: np.ndarray) -> float:
    """SIM: the mean probability of the true next object.

    Args:
        probabilities: `(steps, classes)`, of the next object given the true fixations so far.
        next_objects: `(steps,)`.

    Raises:
        ValueError: if an object is no class, or there are no steps.
    """
    probabilities, next_objects = np.asarray(probabilities), np.asarray(next_objects)
    if not len(next_objects):
        raise ValueError("SIM needs at least one step.")
    if next_objects.min() < 0 or next_objects.max() >= probabilities.shape[1]:
        raise ValueError(
            f"The next objects must be between 0 and {probabilities.shape[1] - 1}, the number of classes minus one."
        )
    return float(np.take_along_axis(probabilities, next_objects[:, None].astype(int), axis=1).mean())


def fixation_map(fixations: np.ndarray, screen: tuple[int, int]) -> np.ndarray:
    """`(height, width)`, 1 at fixations and 0 elsewhere.

    Args:
        fixations: `(fixations, 2)`, x and y in pixels.
        screen: width and height in pixels.

    Raises:
        ValueError: if a fixation is not on the screen.
    """
    width, height = screen
    cells = _cells(fixations, screen)
    counts = np.zeros((height, width))
    counts[cells[:, 1], cells[:, 0]] = 1
    return counts


def normalized_scanpath_saliency(saliency: np.ndarray, fixations: np.ndarray | Sequence) -> float:
    """NSS: the mean of a map, standardised to mean 0 and deviation 1, at people's fixations.

    Args:
        saliency: `(height, width)`, for example the [`fixation_map`] of 100 sampled scanpaths.
        fixations: `(fixations, 2)`, x and y in pixels.

    Raises:
        ValueError: if the map is constant, there are no fixations, or one is outside of the map.
    """
    saliency = np.asarray(saliency, dtype=float)
    deviation = saliency.std()
    if deviation == 0:
        raise ValueError("NSS is not defined for a constant map.")
    cells = _cells(fixations, saliency.shape[::-1])
    return float(((saliency - saliency.mean()) / deviation)[cells[:, 1], cells[:, 0]].mean())


def _cells(fixations: np.ndarray | Sequence, screen: tuple[int, int]) -> np.ndarray:
    points = np.floor(np.asarray(fixations, dtype=float).reshape(-1, 2)).astype(int)
    if not len(points):
        raise ValueError("There are no fixations.")
    outside = (points < 0).any(1) | (points >= np.asarray(screen)).any(1)
    if outside.any():
        raise ValueError(
            f"The fixation {tuple(points[outside][0].tolist())} is outside the screen of {screen[0]} x {screen[1]}."
        )
    return points
