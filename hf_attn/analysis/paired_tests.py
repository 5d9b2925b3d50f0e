"""Wilcoxon's signed-rank test between all pairs of systems that were scored on the same tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class PairedTest:
    """The test of two systems.

    Attributes:
        first, second: the systems.
        difference: mean over the tasks of the first's score minus the second's.
        p: two-sided p-value; 1 if the scores are all equal.
        holm_p: the same, corrected for the number of pairs by Holm's method.
    """

    first: str
    second: str
    difference: float
    p: float
    holm_p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values, in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def paired_tests(scores: Mapping[str, Sequence[float]]) -> list[PairedTest]:
    """Test all pairs of systems with scipy's defaults: two-sided, tasks of equal score left out.

    Args:
        scores: system -> its score on each task, the tasks in one order.

    Raises:
        ValueError: if the systems have different numbers of tasks, or fewer than two.
        ImportError: if scipy is not installed.
    """
    counts = {name: len(values) for name, values in scores.items()}
    if len(set(counts.values())) != 1 or min(counts.values()) < 2:
        raise ValueError(f"Every system needs scores on the same tasks, at least two; got {counts}.")
    try:
        from scipy.stats import wilcoxon
    except ImportError as error:
        raise ImportError("The signed-rank test needs scipy: `pip install 'hf_attn[embeddings]'`.") from error
    pairs = list(combinations(scores, 2))
    p_values, differences = [], []
    for first, second in pairs:
        of_tasks = [one - other for one, other in zip(scores[first], scores[second], strict=True)]
        differences.append(sum(of_tasks) / len(of_tasks))
        p_values.append(float(wilcoxon(of_tasks).pvalue) if any(of_tasks) else 1.0)
    return [
        PairedTest(first, second, difference, p, holm_p)
        for (first, second), difference, p, holm_p in zip(pairs, differences, p_values, holm(p_values), strict=True)
    ]
