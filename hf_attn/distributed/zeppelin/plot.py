"""Plot of a plan: the sequences of each rank, and its attention time."""

from collections.abc import Mapping
from pathlib import Path

from ...analysis.figures import new_figure
from .cost import FORWARD, Hardware, ModelShape
from .partition import ZONES, Plan
from .simulate import attention_seconds_per_rank


_COLOURS = {"local": "#9ecae1", "intra": "#fdae6b", "inter": "#e6550d"}
_MEANINGS = {"local": "on one GPU", "intra": "shared within a node", "inter": "shared by nodes"}


def plot_plan(
    plan: Plan, model: ModelShape, hardware: Hardware, seconds: Mapping[str, float], path: str | Path
) -> None:
    """Draw tokens and attention time of each rank, and the predicted step times.

    Args:
        plan: plan to plot.
        model: sizes.
        hardware: constants of the prediction.
        seconds: predicted step time of each method.
        path: path of the image; its extension determines the format.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
    """
    figure = new_figure(max(9.0, 4.5 + 0.35 * plan.num_ranks), 7.0)
    grid = figure.add_gridspec(2, 2, width_ratios=[2.2, 1])
    tokens, time, methods = (figure.add_subplot(grid[i]) for i in ((0, 0), (1, 0), (slice(None), 1)))
    _draw_tokens(tokens, plan)
    _draw_time(time, plan, model, hardware)
    names = list(seconds)
    methods.barh(names[::-1], [seconds[name] for name in names[::-1]], color="#9ecae1")
    methods.set_xlabel("seconds per step")
    methods.set_title("Predicted step time\nwith these constants")
    for place, name in enumerate(names[::-1]):
        methods.annotate(f" {seconds[name]:.3g}", (seconds[name], place), va="center", fontsize=8)
    methods.set_xlim(0, 1.25 * max(seconds.values()))
    figure.savefig(path, dpi=120)


def _draw_tokens(axes, plan: Plan) -> None:
    bottom = [0] * plan.num_ranks
    order = sorted(range(len(plan.lengths)), key=lambda i: (-ZONES.index(plan.zones[i]), -plan.lengths[i], i))
    # Thousands of labels would cover the plot.
    named = len(plan.lengths) <= 60
    for i in order:
        for rank, count in plan.shares[i]:
            axes.bar(rank, count, bottom=bottom[rank], color=_COLOURS[plan.zones[i]], edgecolor="white", linewidth=0.4)
            if named and count > 0.06 * plan.capacity:
                axes.annotate(str(i), (rank, bottom[rank] + count / 2), ha="center", va="center", fontsize=6)
            bottom[rank] += count
    axes.axhline(plan.capacity, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("capacity", (0, plan.capacity), xytext=(2, 2), textcoords="offset points", fontsize=7)
    mean = sum(plan.lengths) / plan.num_ranks
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--")
    axes.annotate("after remapping", (0, mean), xytext=(2, 2), textcoords="offset points", fontsize=7)
    for zone, colour in _COLOURS.items():
        count = plan.zones.count(zone)
        axes.bar(0, 0, color=colour, label=f"{_MEANINGS[zone]} ({count})")
    axes.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes.set_ylabel("tokens" + (", with the sequence's number" if named else ""))
    # above the legend
    axes.set_title("Sequences on the ranks", pad=20)
    _mark_nodes(axes, plan)


def _draw_time(axes, plan: Plan, model: ModelShape, hardware: Hardware) -> None:
    seconds = [1e3 * time for time in attention_seconds_per_rank(plan, model, hardware, FORWARD)]
    axes.bar(range(plan.num_ranks), seconds, color="#74c476", label="busy")
    longest = max(seconds)
    idle = [longest - time for time in seconds]
    axes.bar(range(plan.num_ranks), idle, bottom=seconds, color="#eeeeee", label="waiting for other ranks")
    axes.set_ylabel("ms of attention, one layer forward")
    axes.set_xlabel("rank")
    axes.set_title("Time in attention, predicted with these constants", pad=20)
    axes.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    _mark_nodes(axes, plan)


def _mark_nodes(axes, plan: Plan) -> None:
    for node in range(1, plan.nodes):
        axes.axvline(node * plan.gpus_per_node - 0.5, color="black", linewidth=0.8)
    step = max(1, plan.num_ranks // 16)
    axes.set_xticks(range(0, plan.num_ranks, step))
