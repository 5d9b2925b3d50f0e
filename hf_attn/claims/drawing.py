"""Parts of the figures that several claims share."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from .result import number_text


COLORS = ("tab:blue", "tab:orange", "tab:grey", "tab:green", "tab:purple", "tab:brown")


def bars(axes, sides: Mapping[str, Sequence[float]], unit: str, title: str = "") -> None:
    """Draw a bar with the mean of each side, its value above the bar, and a dot for each seed.

    If all are close to each other the axis does not begin at zero, and the means are lines.
    """
    lowest, highest = min(map(min, sides.values())), max(map(max, sides.values()))
    margin = 0.3 * (highest - lowest) or 0.1 * abs(highest)
    close = highest < 1.5 * lowest
    for index, values in enumerate(sides.values()):
        color, mean = COLORS[index % len(COLORS)], fmean(values)
        if close:
            axes.plot([index - 0.3, index + 0.3], [mean, mean], color=color, linewidth=4, alpha=0.7)
        else:
            axes.bar(index, mean, color=color, alpha=0.7)
        if len(values) > 1:
            axes.plot([index] * len(values), values, "o", color="black", markersize=4)
        axes.annotate(
            number_text(mean), (index, max(values)), (0, 5), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(sides)), list(sides), fontsize=8)
    axes.set_ylim(lowest - margin if close else 0, highest + margin)
    axes.set_xlim(-0.6, len(sides) - 0.4)
    axes.set_ylabel(unit)
    axes.set_title(title)
