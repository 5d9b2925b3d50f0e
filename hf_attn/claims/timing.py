"""Timing on a machine that runs other work too."""

import time
from collections.abc import Callable, Sequence


def least_cpu_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Minimum CPU seconds of each call, measured in turns after a warm-up.

    Torch runs on one thread in the run of a claim, so CPU time equals the time of a call on an idle core.
    """
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if turn:
                found.append(time.process_time() - start)
    return [min(found) for found in times]
