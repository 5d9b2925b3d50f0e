"""Combiner against full causal attention: which tokens have a weight, how many weights are computed, and the time of a call.

Shown if with each of three plans every pair of a query and an earlier token has a positive weight, and the number of weights that are computed grows with
the length to a power below 1.6, where full attention has 2; contradicted if some pair has none. The weights are those of random queries
and keys by the equations. The quality of language and image models, compared with sparse patterns, is not measured.
"""

import math

import torch
from torch.nn import functional as F

from ...attention.combiner import COMBINERS, combiner_probabilities
from ...kernels.combiner.call import CombinerCall
from ...kernels.combiner.plan import make_plan
from ..drawing import COLORS
from ..result import Conclusion, Figure
from ..timing import least_cpu_seconds


PLANS = ("fixed", "logsparse", "vertical")
#: square numbers, for segments of the length of their root
LENGTHS, TIMED = (256, 1024, 4096), (1024, 4096, 16384)
HEAD_DIM = 64


def measure(work) -> dict:
    lengths, timed, seen = ((16, 64, 256), (64, 256), 64) if work.miniature else (LENGTHS, TIMED, 400)
    return {
        "positive": {kind: work.part(f"weights-{kind}", positive_share, kind, seen) for kind in PLANS},
        "weights": {kind: [[n, count(kind, n), n * (n + 1) // 2] for n in lengths] for kind in PLANS},
        "seconds": [[length, *work.part(f"time-{length}", seconds, length)] for length in timed],
    }


@torch.no_grad()
def positive_share(kind: str, length: int) -> list[float]:
    """Shares of the causal pairs of a query and a key that have a positive weight, and that are attended to directly."""
    torch.manual_seed(0)
    states = [torch.randn(1, 1, length, HEAD_DIM, dtype=torch.float64) for _ in range(3)]
    call = CombinerCall(*states, kind=kind, segment_length=math.isqrt(length), is_causal=True)
    direct, spans, inside = combiner_probabilities(call)
    weights, allowed = direct + spans @ inside, length * (length + 1) / 2
    return [((weights > 0).sum() / allowed).item(), ((direct > 0).sum() / allowed).item()]


def count(kind: str, length: int) -> int:
    """Weights that a head computes: of directly attended tokens, of spans, and of tokens within spans."""
    plan = make_plan(kind, length, math.isqrt(length), True)
    return int(plan.direct.sum() + plan.uses.sum() + plan.members.sum())


@torch.no_grad()
def seconds(length: int) -> list[float]:
    """Minimum CPU seconds of a causal call with one head, in turns: the plans, and torch's full attention."""
    torch.manual_seed(0)
    states = [torch.randn(1, 1, length, HEAD_DIM) for _ in range(3)]

    def combiner(kind: str) -> None:
        call = CombinerCall(*states, kind=kind, segment_length=math.isqrt(length), is_causal=True)
        COMBINERS[kind](call, f"{COMBINERS[kind].name}_torch")

    calls = [*((lambda kind=kind: combiner(kind)) for kind in PLANS)]
    calls.append(lambda: F.scaled_dot_product_attention(*states, is_causal=True))
    return least_cpu_seconds(calls, 5)


def conclude(data: dict) -> Conclusion:
    figures, exponents = [], {}
    for kind, rows in data["weights"].items():
        before, last = rows[-2:]
        exponents[kind] = math.log(last[1] / before[1], last[0] / before[0])
        figures.append(
            Figure.of(
                f"weights of a head, {last[0]} tokens, {kind}",
                "thousand",
                last[1] / 1e3,
                "full attention",
                last[2] / 1e3,
            )
        )
    for kind, (all_seen, direct) in data["positive"].items():
        figures.append(Figure.of(f"pairs with a weight, {kind}", "%", 100 * all_seen, "seen directly", 100 * direct))
    length, *times, full = data["seconds"][-1]
    for kind, found in zip(PLANS, times, strict=True):
        figures.append(
            Figure.of(
                f"time of a call, {length} tokens, {kind}",
                "CPU ms",
                1e3 * found,
                "scaled_dot_product_attention",
                1e3 * full,
            )
        )
    complete = all(share == 1 for share, _ in data["positive"].values())
    growth = ", ".join(f"{exponent:.2f} ({kind})" for kind, exponent in exponents.items())
    why = f"{'All' if complete else 'Not all'} pairs have a weight, and the weights grow with the length to the power {growth}."
    if not complete:
        return Conclusion(tuple(figures), "contradicted here", why)
    return Conclusion(tuple(figures), "shown" if max(exponents.values()) < 1.6 else "not shown here", why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    lengths = [row[0] for row in data["weights"][PLANS[0]]]
    left.loglog(lengths, [row[2] for row in data["weights"][PLANS[0]]], "s--", color="black", label="full attention")
    right.loglog(*zip(*((row[0], row[-1]) for row in data["seconds"]), strict=True), "s--", color="black")
    for index, (kind, color) in enumerate(zip(PLANS, COLORS, strict=False)):
        left.loglog(lengths, [row[1] for row in data["weights"][kind]], "o-", color=color, label=kind)
        right.loglog(*zip(*((row[0], row[1 + index]) for row in data["seconds"]), strict=True), "o-", color=color)
    for axes, ticks, title in (
        (left, lengths, "weights that a head computes\n(every earlier token has one)"),
        (right, [row[0] for row in data["seconds"]], "CPU seconds of a call"),
    ):
        axes.set(xlabel="tokens", title=title)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    left.legend()
