"""Zeppelin: attention of uneven batches on four processes of this machine, and predicted steps of a 7B model on A800 GPUs.

What is measured are the CPU seconds of attention of the busiest process, for which all others have to wait: by Zeppelin's plan, with every
sequence split evenly, and with whole sequences dealt out and padded. A step on GPUs is predicted by the simulator, not measured. Shown in small
if for every batch the busiest process has less to do than with either other way, and the predicted step is shorter than with even splitting in
every setting; contradicted if for every batch it has more to do than with even splitting.
"""

import random
from statistics import fmean

from ...distributed.zeppelin.balance import compare_on_processes
from ...distributed.zeppelin.cost import HARDWARE, MODELS
from ...distributed.zeppelin.lengths import sample_lengths
from ...distributed.zeppelin.partition import partition
from ...distributed.zeppelin.simulate import simulate
from ..drawing import COLORS, bars
from ..result import Conclusion, Figure, agreement


SETTINGS = [(nodes, lengths) for nodes in (2, 4) for lengths in ("short", "mid", "long")]
#: tokens per GPU, and its capacity
TOKENS, CAPACITY = 4096, 5120
WAYS = ("Zeppelin", "even ring", "padding")


def measure(work) -> dict:
    seeds = work.seeds[:1] if work.miniature else work.seeds  # starting processes takes seconds
    return {
        "busiest": [work.part(f"processes-seed{seed}", busiest, work.miniature, seed) for seed in seeds],
        "predicted": [
            [nodes, lengths, *work.part(f"predicted-{nodes}-{lengths}", speedups, nodes, lengths, work.seeds)]
            for nodes, lengths in (SETTINGS[:1] if work.miniature else SETTINGS)
        ],
    }


def skewed(miniature: bool, seed: int) -> list[int]:
    """Lengths of a batch: one long document, some of medium length, many short ones."""
    draw = random.Random(seed).randint
    if miniature:
        return [draw(40, 60), *(draw(4, 20) for _ in range(5))]
    middle, short = [draw(300, 700) for _ in range(3)], [draw(100, 200) for _ in range(8)]
    return [2048, *middle, *short, *(draw(20, 60) for _ in range(20))]


def busiest(miniature: bool, seed: int) -> dict[str, float]:
    """CPU milliseconds of the busiest of four processes."""
    heads, repeats = (1, 1) if miniature else (4, 5)
    found = compare_on_processes(skewed(miniature, seed), heads, repeats)
    return {name: 1e3 * max(found[name].busy) for name in WAYS}


def speedups(nodes: int, lengths: str, seeds) -> list[float]:
    """Predicted speed-ups of a step with Zeppelin over one with even splitting."""
    ratios = []
    for seed in seeds:
        plan = partition(sample_lengths(lengths, TOKENS * nodes * 8, seed), nodes, 8, CAPACITY)
        seconds = simulate(plan, MODELS["7b"], HARDWARE["a800"])
        ratios.append(seconds["te_cp"] / seconds["zeppelin"])
    return ratios


def conclude(data: dict) -> Conclusion:
    sides = {name: [found[name] for found in data["busiest"]] for name in WAYS}
    figures = [
        Figure.of("attention of the busiest of four processes", "CPU ms", sides["Zeppelin"], name, sides[name])
        for name in WAYS[1:]
    ]
    by_mean = sorted(data["predicted"], key=lambda row: fmean(row[2:]))
    for extreme, (nodes, lengths, *ratios) in (("smallest", by_mean[0]), ("largest", by_mean[-1])):
        setting = f"{nodes} nodes of 8 A800, {lengths} sequences"
        figures.append(Figure.of(f"{extreme} predicted speed-up over even splitting, {setting}", "times", ratios))
    orders = [agreement(sides[name], sides["Zeppelin"]) for name in WAYS[1:]]
    lowest = min(ratio for _, _, *ratios in data["predicted"] for ratio in ratios)
    words = {1: "less", 0: "not clearly less", -1: "more"}
    why = (
        f"The busiest process has {words[orders[0]]} to do than with even splitting and {words[orders[1]]} than with padding; the smallest "
        f"predicted speed-up is {lowest:.2f}."
    )
    if orders[0] < 0:
        return Conclusion(tuple(figures), "contradicted here", why)
    return Conclusion(tuple(figures), "shown in small" if min(orders) > 0 and lowest > 1 else "not shown here", why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    sides = {name: [found[name] for found in data["busiest"]] for name in WAYS}
    bars(left, sides, "CPU ms", "attention of the busiest process\n(measured)")
    settings = {}
    for nodes, lengths, *ratios in data["predicted"]:
        settings.setdefault(nodes, {})[lengths] = ratios
    for (nodes, found), color in zip(settings.items(), COLORS, strict=False):
        right.plot(
            list(found), [fmean(ratios) for ratios in found.values()], "o-", color=color, label=f"{nodes} nodes"
        )
    right.axhline(1, color="black", linestyle="--")
    right.set(
        xlabel="sequences", ylim=(0, None), title="times faster than even splitting\n(predicted, 7B model, A800)"
    )
    right.legend()
