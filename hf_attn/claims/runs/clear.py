"""CLEAR: operations of local and full attention, counted for FLUX at 1024 to 8192 pixels, and the time of one call.

Shown if, from 4096 to 8192 pixels, the pairs of an image of four times the pixels grow at most by a tenth more than the pixels, and the
time of a call by at most a quarter more between the two largest grids; contradicted if the pairs grow faster than that. The
images of a distilled model need its weights and a GPU, and are not evaluated.
"""

import math

import torch
from torch.nn import functional as F

from ...attention.clear import clear_attention, clear_mask
from ..result import Conclusion, Figure
from ..timing import least_cpu_seconds


RADIUS, TEXT_LENGTH, HEAD_DIM = 8, 512, 64
#: side of the square of pixels that one token covers
TOKEN = 16
PIXELS = (1024, 2048, 4096, 8192)
#: sides of the grids that are timed; full attention is not timed on the last one
TIMED, TIMED_MINIATURE = (32, 64, 128, 256), (16, 24, 32)


def measure(work) -> dict:
    sides = TIMED_MINIATURE if work.miniature else TIMED
    check_count()
    return {
        "pairs": work.part("pairs", lambda: [[side, *count(side // TOKEN)] for side in PIXELS]),
        "seconds": [[side * TOKEN, *work.part(f"time-{side}", seconds, side, side < sides[-1])] for side in sides],
    }


def count(side: int, radius: int = RADIUS, text_length: int = TEXT_LENGTH) -> tuple[int, int]:
    """Pairs of a query and a key on a square grid with text: those of CLEAR, and all."""
    reach = range(-radius + 1, radius)
    disc = sum(
        max(0, side - abs(y)) * max(0, side - abs(x)) for y in reach for x in reach if y * y + x * x < radius * radius
    )
    tokens = side * side + text_length
    return disc + text_length * (tokens + side * side), tokens * tokens


def check_count() -> None:
    """Check the count against the mask that attention uses."""
    mask = clear_mask(12, 12, 7, 5)
    if (int(mask.sum()), mask.numel()) != count(12, 5, 7):
        raise RuntimeError("The pairs that are counted are not those that the mask of CLEAR allows.")


@torch.no_grad()
def seconds(side: int, with_full: bool) -> list[float | None]:
    """Minimum CPU seconds of a call with one head on one thread, in turns: CLEAR, and torch's full attention."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, side * side + TEXT_LENGTH, HEAD_DIM) for _ in range(3)]
    calls = [lambda: clear_attention(*inputs, grid=(side, side), radius=RADIUS)]
    if with_full:
        calls.append(lambda: F.scaled_dot_product_attention(*inputs))
    return [*least_cpu_seconds(calls, 3), *([] if with_full else [None])]


def growth(rows: list[list], column: int = 1) -> float:
    """Exponent of the growth with the number of pixels between the last two rows: 1 is linear, 2 quadratic."""
    before, last = rows[-2:]
    return math.log(last[column] / before[column], (last[0] / before[0]) ** 2)


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
            "CPU ms",
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
    right.set_title("CPU seconds of a call")
    left.legend()
