# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Entropic transport plans of a batch, against POT sample by sample and against an unrolled loop in the log domain.

- `entropic_plan`: this package, all samples at once, in float32;
- `POT, log domain` and `POT, plain`: `ot.bregman.sinkhorn_log` and `sinkhorn_knopp`, one sample after another, in float64, as they
  are used with NumPy;
- `loop`: the sweeps in the log domain on the whole batch (`entropic_plan_eager`), whose gradients come from autograd.

Both exact solvers are timed on one sample. Times are the least of several, measured in turns.

    OMP_NUM_THREADS=1 python scripts/benchmarks/transport.py --json transport.json
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch
from _common import alternating_times, print_table, write_json

from hf_attn.architectures.transport import (
    entropic_plan,
    entropic_plan_eager,
    exact_plan,
    squared_distances,
)


def sample_by_sample(solver: Callable, costs: np.ndarray, reg: float, sweeps: int) -> list[np.ndarray]:
    a, b = (np.full(size, 1 / size) for size in costs.shape[1:])
    return [solver(a, b, cost, reg, numItermax=sweeps, stopThr=0, warn=False) for cost in costs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_length", type=int, default=197)
    parser.add_argument("--text_length", type=int, default=128)
    parser.add_argument("--reg", type=float, default=0.1)
    parser.add_argument("--sweeps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    lengths = (options.image_length, options.text_length)
    image, text = (torch.randn(options.batch_size, length, 768) for length in lengths)
    cost = squared_distances(image, text)
    costs = cost.double().numpy()
    leaf = cost.clone().requires_grad_()

    def with_backward(function: Callable) -> None:
        leaf.grad = None
        function(leaf, options.reg, options.sweeps).square().sum().backward()

    callables = {
        "entropic_plan": lambda: entropic_plan(cost, options.reg, options.sweeps),
        "POT, log domain": lambda: sample_by_sample(ot.bregman.sinkhorn_log, costs, options.reg, options.sweeps),
        "POT, plain": lambda: sample_by_sample(ot.bregman.sinkhorn_knopp, costs, options.reg, options.sweeps),
        "loop": lambda: entropic_plan_eager(cost, options.reg, options.sweeps),
        "entropic_plan with backward": lambda: with_backward(entropic_plan),
        "loop with backward": lambda: with_backward(entropic_plan_eager),
        "exact, POT": lambda: exact_plan(cost[:1], solver="pot"),
        "exact, scipy": lambda: exact_plan(cost[:1], solver="scipy"),
    }
    seconds = {name: min(times) for name, times in alternating_times(callables, options.repeats).items()}
    print_table([{"": name, "ms": 1e3 * value} for name, value in seconds.items()])
    fast = seconds["entropic_plan"]
    row = {
        "x POT, log domain": seconds["POT, log domain"] / fast,
        "x POT, plain": seconds["POT, plain"] / fast,
        "x loop": seconds["loop"] / fast,
        "x loop, with backward": seconds["loop with backward"] / seconds["entropic_plan with backward"],
    }
    print_table([row])
    write_json(
        options.json, {**{name: value for name, value in vars(options).items() if name != "json"}, **seconds, **row}
    )


if __name__ == "__main__":
    main()
