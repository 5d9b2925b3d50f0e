"""CLEAR: attention operations of a disc against all pairs, counted for FLUX at 1024 to 8192 pixels, and the time of one call.

Shown if, from 4096 to 8192 pixels, the pairs of an image of four times the pixels grow at most by a tenth more than the pixels, and the
time of a call by at most a quarter more between the two largest grids; contradicted if the pairs grow faster than that. The pictures
that a distilled model makes need its weights and a GPU, and are not judged.
"""

import math
import statistics
import time

import torch
from torch.nn import functional as F

from ...attention.clear import clear_attention, clear_mask
from ..result import Conclusion, Figure


RADIUS, TEXT_LENGTH, HEAD_DIM = 8, 512, 64
#: pixels of a side that one token covers
TOKEN = 16
PIXELS = (1024, 2048, 4096, 8192)
#: sides of the grids that are timed; full attention up to the second last
TIMED, TIMED_MINIATURE = (32, 64, 128, 192, 256), (16, 24, 32, 48)


def measure(work) -> dict:
    sides = TIMED_MINIATURE if work.miniature else TIMED
    check_count()
    return {
        "pairs": work.part("pairs", lambda: [[side, *count(side // TOKEN)] for side in PIXELS]),
        "seconds": [[side * TOKEN, *work.part(f"time-{side}", seconds, side, side <= sides[-3])] for side in sides],
    }


def count(side: int, radius: int = RADIUS, text_length: int = TEXT_LENGTH) -> tuple[int, int]:
    """Pairs of a query and a key on a square grid with text: of CLEAR, and all."""
    reach = range(-radius + 1, radius)
    disc = sum(
        max(0, side - abs(y)) * max(0, side - abs(x)) for y in reach for x in reach if y * y + x * x < radius * radius
    )
    tokens = side * side + text_length
    return disc + text_length * (tokens + side * side), tokens * tokens


def check_count() -> None:
    """The count is that of the mask that attention uses."""
    mask = clear_mask(12, 12, 7, 5)
    if (int(mask.sum()), mask.numel()) != count(12, 5, 7):
        raise RuntimeError("The pairs that are counted are not those that the mask of CLEAR allows.")


@torch.no_grad()
def seconds(side: int, with_full: bool) -> list[float | None]:
    """Median seconds of a call with one head: CLEAR, and full attention of torch in turns with it."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, side * side + TEXT_LENGTH, HEAD_DIM) for _ in range(3)]
    calls = [lambda: clear_attention(*inputs, grid=(side, side), radius=RADIUS)]
    if with_full:
        calls.append(lambda: F.scaled_dot_product_attention(*inputs))
    times = [[] for _ in calls]
    for turn in range(6):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                found.append(time.perf_counter() - start)
    return [*map(statistics.median, times), *([] if with_full else [None])]


def growth(values: list[list], column: int = 1) -> float:
    """Exponent of the growth with the pixels between the last two rows: 1 is linear, 2 quadratic."""
    (small, *_), (large, *_) = values[-2:]
    return math.log(values[-1][column] / values[-2][column], (large / small) ** 2)


def conclude(data: dict) -> Conclusion:
    pairs, seconds = data["pairs"], data["seconds"]
    both = [row for row in seconds if row[2] is not None]
    figures = (
        Figure.of(
            f"attention operations at {pairs[-1][0]} pixels", "% of full attention", 100 * pairs[-1][1] / pairs[-1][2]
        ),
        Figure.of(
            f"attention operations at {pairs[0][0]} pixels", "% of full attention", 100 * pairs[0][1] / pairs[0][2]
        ),
        Figure.of("exponent of the growth of operations with pixels", "", growth(pairs), "full", growth(pairs, 2)),
        Figure.of("exponent of the growth of time with pixels", "", growth(seconds), "full", growth(both, 2)),
        Figure.of(
            f"time of a call at {both[-1][0]} pixels, one head",
            "ms",
            1e3 * both[-1][1],
            "scaled_dot_product_attention of torch",
            1e3 * both[-1][2],
        ),
    )
    operations, time_growth = figures[2].value, figures[3].value
    why = f"Operations grow with the pixels to the power {operations:.2f}, and time to the power {time_growth:.2f}."
    if operations > 1.1:
        return Conclusion(figures, "contradicted here", why)
    return Conclusion(figures, "shown" if time_growth <= 1.25 else "not shown here", why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for axes, rows, scale in ((left, data["pairs"], 1), (right, data["seconds"], 1)):
        for column, name, style in ((2, "full attention", "s--"), (1, f"CLEAR, radius {RADIUS}", "o-")):
            points = [(row[0], row[column] * scale) for row in rows if row[column] is not None]
            axes.loglog(*zip(*points, strict=True), style, label=name)
        axes.set_xlabel("pixels of a side")
        axes.set_xticks([row[0] for row in rows], [str(row[0]) for row in rows], minor=False)
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    left.set_title("pairs of query and key")
    right.set_title("seconds of a call on a CPU")
    left.legend()
