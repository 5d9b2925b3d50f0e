"""Fair times on a machine that does other work too."""

import time
from collections.abc import Callable, Sequence


def least_cpu_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Least CPU seconds of each call, in turns, after one turn that does not count.

    Torch runs on one thread in the run of a claim, so these are the seconds of a call on a core that is free.
    """
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if turn:
                found.append(time.process_time() - start)
    return [min(found) for found in times]
