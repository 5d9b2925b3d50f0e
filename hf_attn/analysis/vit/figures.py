"""Static figures of an analysis, in the order of its views."""

import math
from typing import TYPE_CHECKING

import torch

from ..figures import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .results import ViTAnalysis


def all_figures(analysis: "ViTAnalysis") -> dict[str, "Figure"]:
    """The figures that the results permit, by name."""
    figures = {
        "importance": importance_figure(analysis),
        "reach": reach_figure(analysis),
        "offset_maps": offset_figure(analysis),
    }
    if analysis.partial:
        figures["partial"] = partial_figure(analysis)
    if analysis.curves:
        figures["curve"] = curve_figure(analysis)
    if analysis.patch_entropy.numel() >= 3:
        figures["clusters"] = cluster_figure(analysis)
    return figures


def importance_figure(analysis: "ViTAnalysis") -> "Figure":
    """A heat map of heads for each metric."""
    columns = min(4, len(analysis.metrics))
    rows = math.ceil(len(analysis.metrics) / columns)
    figure = new_figure(3 * columns, 2.6 * rows)
    for place, (name, values) in enumerate(analysis.leave_one_out.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        image = axes.imshow(values.mean(-1).numpy(), aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axes)
    return figure


def partial_figure(analysis: "ViTAnalysis") -> "Figure":
    """Bars of the ranking metric without parts of the most important heads."""
    figure = new_figure(3.4 * len(analysis.partial), 3)
    metric = analysis.ranking_metric
    for place, ((layer, head), parts) in enumerate(analysis.partial.items(), 1):
        axes = figure.add_subplot(1, len(analysis.partial), place)
        axes.barh(list(parts)[::-1], [changes[metric].mean().item() for changes in list(parts.values())[::-1]])
        axes.set(title=f"layer {layer}, head {head}", xlabel=metric)
    return figure


def curve_figure(analysis: "ViTAnalysis") -> "Figure":
    """Accuracy, or agreement with the full model, against heads removed."""
    figure = new_figure(5, 3.4)
    axes = figure.add_subplot()
    for order in dict.fromkeys(row["order"] for row in analysis.curves):
        rows = [row for row in analysis.curves if row["order"] == order]
        removed, mean, std = ([row[name] for row in rows] for name in ("removed", "mean", "std"))
        axes.errorbar(removed, mean, yerr=std, label=order, capsize=2)
    axes.set(xlabel="heads removed", ylabel=analysis.curves[0]["score"], ylim=(0, 1.02))
    axes.legend()
    return figure


def reach_figure(analysis: "ViTAnalysis") -> "Figure":
    """Ring profiles by layer with quartiles over heads, a box for each hop, and mean hop by layer."""
    profiles = analysis.strength.ring_mean
    layers, heads, hops = profiles.shape
    figure = new_figure(12, 3.4)
    lines, boxes, trend = figure.subplots(1, 3)
    positions = range(hops)
    colours = _colours(layers)
    for layer in range(layers):
        low, middle, high = (profiles[layer].quantile(q, dim=0).numpy() for q in (0.25, 0.5, 0.75))
        lines.plot(positions, middle, color=colours[layer], label=f"layer {layer}")
        lines.fill_between(positions, low, high, color=colours[layer], alpha=0.15)
    lines.axhline(1 / analysis.grid.num_tokens, color="black", linestyle="--", linewidth=0.8)
    lines.set(xlabel="hop", ylabel="attention per patch of the ring", title="median and quartiles over heads")
    if layers <= 12:
        lines.legend(fontsize="x-small")
    boxes.boxplot(profiles.flatten(0, 1).numpy(), positions=list(positions), showfliers=False)
    boxes.set(xlabel="hop", title="all heads")
    mean_hop = analysis.strength.mean_hop
    trend.plot(range(layers), mean_hop.median(1).values.numpy(), color="black")
    for head in range(heads):
        trend.plot(range(layers), mean_hop[:, head].numpy(), "o", alpha=0.5)
    trend.set(xlabel="layer", ylabel="mean hop", title="heads, and their median")
    return figure


def offset_figure(analysis: "ViTAnalysis") -> "Figure":
    """The offset map of each head, on a scale of its own."""
    layers, heads = analysis.patch_entropy.shape
    figure = new_figure(1 + 0.9 * heads, 1 + 0.9 * layers)
    for place, (axes, values) in enumerate(
        zip(figure.subplots(layers, heads, squeeze=False).flat, analysis.offset_maps.flatten(0, 1), strict=True)
    ):
        axes.imshow(values.numpy())
        axes.set_title(f"{place // heads}.{place % heads}", fontsize=7, pad=2)
        axes.set_axis_off()
    return figure


def cluster_figure(analysis: "ViTAnalysis") -> "Figure":
    """Heads by the principal components of their maps, and the mean offset map of each cluster."""
    clusters = analysis.clusters()
    count = len(clusters.names)
    figure = new_figure(5 + 1.6 * math.ceil(count / 2), 4)
    scatter, cards = figure.subfigures(1, 2, width_ratios=[5, max(1.6, 1.6 * math.ceil(count / 2))])
    axes = scatter.add_subplot()
    colours = _colours(count)
    for label, name in enumerate(clusters.names):
        chosen = clusters.labels == label
        axes.scatter(*clusters.positions[chosen].T, color=colours[label], label=f"{label}: {name} ({chosen.sum()})")
    axes.set(xlabel="first component", ylabel="second component")
    axes.legend(fontsize="x-small")
    flat = analysis.offset_maps.flatten(0, 1)
    cells = cards.subplots(2, math.ceil(count / 2), squeeze=False).flat
    for label, cell in enumerate(cells):
        cell.set_axis_off()
        if label < count:
            cell.imshow(flat[torch.from_numpy(clusters.labels == label)].mean(0).numpy())
            cell.set_title(f"{label}: {clusters.names[label]}", fontsize=8)
    return figure


def _colours(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["turbo"]((index + 0.5) / count) for index in range(count)]
