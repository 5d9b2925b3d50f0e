# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Zeppelin: time of planning, its attention on a skewed batch, and the simulator's table.

    python scripts/benchmarks/zeppelin.py --json zeppelin.json

`planning`: milliseconds of the partition and the remapping of 4,096 sequences on 16 x 8 ranks. `engine`: attention of a skewed batch on four gloo
processes with one thread each, forward and backward: Zeppelin's plan, every sequence split evenly over all processes (even ring), and
sequences dealt out and padded to the longest. Tokens a second are by the clock; processes here share cores and have no network, so
what counts is the idle share: of the CPU seconds of attention of the busiest process, those in which the others wait. `simulator`: predicted
speed-up over even context parallelism (`te_cp`), the mean of ten batches, under the constants of the package for A800. None of
these are the paper's measurements.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from _common import print_table, write_json

from hf_attn.distributed.zeppelin.balance import compare_on_processes
from hf_attn.distributed.zeppelin.cost import HARDWARE, MODELS
from hf_attn.distributed.zeppelin.lengths import sample_lengths
from hf_attn.distributed.zeppelin.partition import default_capacity, partition
from hf_attn.distributed.zeppelin.remap import plan_remap
from hf_attn.distributed.zeppelin.simulate import METHODS, simulate


TASKS = ("planning", "engine", "simulator")
#: a long document, some of a middle length, many short ones
SKEWED = [2048, *[512] * 3, *[150] * 8, *[40] * 20]


def planning(options: argparse.Namespace) -> list[dict]:
    rows = []
    for name in ("short", "mid", "long", "web"):
        lengths = sample_lengths(name, 10**9 if name == "long" else 10**8)[:4096]
        for slack in (0.01, 0.1, 0.25):
            capacity = default_capacity(lengths, 128, slack)
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                plan_remap(partition(lengths, 16, 8, capacity).tokens_per_rank, 8)
                seconds.append(time.perf_counter() - start)
            rows.append(
                {"lengths": name, "sequences": len(lengths), "slack": slack, "ms": 1e3 * statistics.median(seconds)}
            )
    return rows


def engine(options: argparse.Namespace) -> list[dict]:
    measured = compare_on_processes(SKEWED, options.heads, options.repeats)
    return [
        {
            "method": name,
            "tokens/s": found.tokens_a_second,
            "CPU s, busiest": max(found.busy),
            "CPU s, total": sum(found.busy),
            "idle, mean": statistics.mean(found.idle),
            "idle of each": " ".join(f"{share:.0%}" for share in found.idle),
        }
        for name, found in measured.items()
    ]


def simulator(options: argparse.Namespace) -> list[dict]:
    rows = []
    for nodes in (2, 4):
        for name in ("short", "mid", "long"):
            speedups = {method: [] for method in METHODS}
            for seed in range(10):
                lengths = sample_lengths(name, 4096 * nodes * 8, seed)
                seconds = simulate(partition(lengths, nodes, 8, 5120), MODELS["7b"], HARDWARE["a800"])
                for method in METHODS:
                    speedups[method].append(seconds["te_cp"] / seconds[method])
            means = {method: statistics.mean(values) for method, values in speedups.items()}
            rows.append({"nodes": nodes, "lengths": name, **means})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="JSON output file")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = {}
    for task in options.tasks:
        results[task] = {"planning": planning, "engine": engine, "simulator": simulator}[task](options)
        print(f"\n{task}" + (" (predicted with these constants: speed-up over te_cp)" if task == "simulator" else ""))
        print_table(results[task])
    write_json(options.json, results)


if __name__ == "__main__":
    main()
