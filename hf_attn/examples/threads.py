"""Threads of torch on a machine that others use as well."""

import time

import torch


def use_free_cores(rounds: int = 15) -> int:
    """Take as many threads as make small convolutions fastest, now: all cores, half of them, ... one.

    A parallel loop ends when its last thread does: if a core is taken by another process, fewer threads are faster.

    Returns:
        The number of threads, which is set.
    """
    most = torch.get_num_threads()
    candidates = [most]
    while candidates[-1] > 1:
        candidates.append(candidates[-1] // 2)
    images, weight = torch.randn(8, 24, 32, 32), torch.randn(24, 24, 3, 3)
    seconds = dict.fromkeys(candidates, 0.0)
    for number in candidates:
        torch.set_num_threads(number)
        torch.nn.functional.conv2d(images, weight)
    # In turns, so that the load of the machine affects all equally.
    for _ in range(rounds):
        for number in candidates:
            torch.set_num_threads(number)
            start = time.perf_counter()
            for _ in range(5):
                torch.nn.functional.conv2d(images, weight).relu_()
            seconds[number] += time.perf_counter() - start
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    return best
