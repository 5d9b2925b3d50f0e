"""Likeness of two scanpaths as sequences of objects."""

from collections.abc import Sequence

import numpy as np


def sequence_score(scanpath: Sequence[int], other: Sequence[int]) -> float:
    """Longest common subsequence over the longer length: 1 for equal scanpaths, 0 if they share no object.

    It is the alignment of Needleman and Wunsch with match 1, mismatch 0 and gap 0. Two empty scanpaths are equal.
    """
    longer = max(len(scanpath), len(other))
    if longer == 0:
        return 1.0
    row = np.zeros(len(other) + 1, dtype=np.int64)
    for object_index in scanpath:
        matches = row[:-1] + (np.asarray(other) == object_index)
        # What may be gained by skipping objects of the other scanpath is a running maximum.
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], matches))
    return float(row[-1] / longer)


def edit_distance(scanpath: Sequence[int], other: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn one scanpath into the other (Levenshtein)."""
    places = np.arange(len(other) + 1)
    row = places.copy()
    for index, object_index in enumerate(scanpath, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (np.asarray(other) != object_index))
        # An insertion costs 1 a step, so it is a running minimum of the cost minus the place.
        row = np.minimum.accumulate(np.concatenate([[index], best]) - places) + places
    return int(row[-1])
