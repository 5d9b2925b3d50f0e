"""MultiMatch: likeness of two scanpaths as sequences of saccades (Jarodzka et al., 2010), without their durations."""

import math
from typing import NamedTuple

import numpy as np


class MultiMatch(NamedTuple):
    """Four similarities, 1 for equal scanpaths."""

    vector: float
    direction: float
    length: float
    position: float


def multimatch(scanpath: np.ndarray, other: np.ndarray, screen: tuple[float, float]) -> MultiMatch:
    """Compare two scanpaths.

    The saccades are aligned so that the differences of their vectors along the alignment sum up to the least; the similarities are
    made of the medians along it. As in OAT's evaluation, scanpaths are not simplified, and one of fewer than three fixations is
    filled up with the point (1, 1).

    Args:
        scanpath: fixations `(length, 2)`, x and y in pixels.
        other: the other scanpath.
        screen: width and height of the screen in pixels.
    """
    starts, saccades = _saccades(scanpath)
    other_starts, other_saccades = _saccades(other)
    rows, columns = _alignment(np.linalg.norm(saccades[:, None] - other_saccades[None], axis=-1))
    a, b = saccades[rows], other_saccades[columns]
    lengths, other_lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    turn = np.arctan2(a[:, 1], a[:, 0]) - np.arctan2(b[:, 1], b[:, 0])
    turn = np.abs((turn + math.pi) % (2 * math.pi) - math.pi)
    diagonal = math.hypot(*screen)
    return MultiMatch(
        vector=1 - float(np.median(np.linalg.norm(a - b, axis=1))) / (2 * diagonal),
        direction=1 - float(np.median(turn)) / math.pi,
        length=1 - float(np.median(np.abs(lengths - other_lengths))) / diagonal,
        position=1 - float(np.median(np.linalg.norm(starts[rows] - other_starts[columns], axis=1))) / diagonal,
    )


def _saccades(scanpath: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(scanpath, dtype=float).reshape(-1, 2)
    if len(points) < 3:
        points = np.concatenate([points, np.ones((3 - len(points), 2))])
    return points[:-1], np.diff(points, axis=0)


def _alignment(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path of least cost from the first to the last cell by steps right, down and diagonal, without the cost of the first."""
    total = costs.copy()
    total[0, 0] = 0
    for i in range(costs.shape[0]):
        for j in range(costs.shape[1]):
            before = [total[k, m] for k, m in ((i, j - 1), (i - 1, j), (i - 1, j - 1)) if k >= 0 and m >= 0]
            if before:
                total[i, j] += min(before)
    i, j = costs.shape[0] - 1, costs.shape[1] - 1
    way = [(i, j)]
    while i or j:
        steps = [(k, m) for k, m in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if k >= 0 and m >= 0]
        i, j = min(steps, key=lambda cell: total[cell])
        way.append((i, j))
    rows, columns = np.array(way[::-1]).T
    return rows, columns
