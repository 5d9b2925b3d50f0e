"""Parts of pictures that several claims have."""

from collections.abc import Mapping, Sequence
from statistics import fmean


COLORS = ("tab:blue", "tab:orange", "tab:grey", "tab:green", "tab:purple", "tab:brown")


def bars(axes, sides: Mapping[str, Sequence[float]], unit: str, title: str = "") -> None:
    """A bar with the mean of each side, its value above it, and a dot for each seed; the axis begins below the lowest dot."""
    lowest, highest = min(map(min, sides.values())), max(map(max, sides.values()))
    margin = max(0.3 * (highest - lowest), 1e-3 * abs(highest))
    bottom = max(0.0, lowest - 2 * margin)
    for index, values in enumerate(sides.values()):
        axes.bar(index, fmean(values) - bottom, bottom=bottom, color=COLORS[index % len(COLORS)], alpha=0.7)
        axes.plot([index] * len(values), values, "o", color="black", markersize=4)
        axes.annotate(f"{fmean(values):.3g}", (index, max(values)), (0, 5), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(sides)), list(sides))
    axes.set_ylim(bottom, highest + margin)
    axes.set_ylabel(unit)
    axes.set_title(title)
