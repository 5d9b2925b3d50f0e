"""Parts of pictures that several claims have."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from .result import number_text


COLORS = ("tab:blue", "tab:orange", "tab:grey", "tab:green", "tab:purple", "tab:brown")


def bars(axes, sides: Mapping[str, Sequence[float]], unit: str, title: str = "") -> None:
    """A bar with the mean of each side, its value above it, and a dot for each seed.

    The axis begins at zero, or below the lowest dot if all are close to each other.
    """
    lowest, highest = min(map(min, sides.values())), max(map(max, sides.values()))
    margin = 0.3 * (highest - lowest) or 0.1 * abs(highest)
    bottom = lowest - 2 * margin if highest < 1.5 * lowest else 0.0
    for index, values in enumerate(sides.values()):
        axes.bar(index, fmean(values) - bottom, bottom=bottom, color=COLORS[index % len(COLORS)], alpha=0.7)
        if len(values) > 1:
            axes.plot([index] * len(values), values, "o", color="black", markersize=4)
        axes.annotate(
            number_text(fmean(values)),
            (index, max(values)),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xticks(range(len(sides)), list(sides), fontsize=8)
    axes.set_ylim(bottom, highest + margin)
    axes.set_ylabel(unit)
    axes.set_title(title)
