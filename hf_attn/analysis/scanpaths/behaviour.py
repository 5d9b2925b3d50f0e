"""Search behaviour, and how far a model's behaviour is from that of people (delta, the paper's own measure)."""

from collections.abc import Iterable, Sequence

import numpy as np


#: what [`behaviour`] measures, in order
MEASURES = ("found", "length", "search", "refixation", "revisit")


def behaviour(scanpath: Sequence[int], target: int) -> np.ndarray:
    """Five metrics of a scanpath, see [`MEASURES`].

    `found` is 1 if the last fixation is at the target. `length` counts the fixations. The other three are shares of them: a
    fixation of the object that was looked at just before is a refixation; else it is a revisit if the object was seen earlier, or
    search.

    Args:
        scanpath: objects in order, at least one.
        target: the object that is searched for.

    Raises:
        ValueError: if the scanpath is empty.
    """
    if len(scanpath) == 0:
        raise ValueError("A scanpath without fixations has no behaviour.")
    seen: set[int] = set()
    counts = dict.fromkeys(("search", "refixation", "revisit"), 0)
    previous = None
    for index in scanpath:
        counts["refixation" if index == previous else "revisit" if index in seen else "search"] += 1
        seen.add(index)
        previous = index
    shares = [counts[name] / len(scanpath) for name in MEASURES[2:]]
    return np.array([float(scanpath[-1] == target), len(scanpath), *shares])


def behavioural_distance(model: Iterable[np.ndarray], people: Iterable[np.ndarray]) -> float:
    """Delta: mean over the five measures of |m - h| / h, for the averages m of a model and h of people.

    Args:
        model: behaviours of the model's scanpaths.
        people: behaviours of people's scanpaths.

    Returns:
        The distance; infinite if people never do something that the model does. What neither does counts as no difference.

    Raises:
        ValueError: if either is empty.
    """
    model, people = np.array(list(model), dtype=float), np.array(list(people), dtype=float)
    if not len(model) or not len(people):
        raise ValueError("Delta needs at least one scanpath of the model and one human scanpath.")
    difference = np.abs(model.mean(0) - people.mean(0))
    average = people.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference == 0, 0.0, difference / average).mean())
