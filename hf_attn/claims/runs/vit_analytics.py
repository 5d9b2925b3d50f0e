"""Heads of a trained ViT: accuracy without those that pruning finds important, against as many random ones and the unimportant.

A ViT of transformers learns the digits. Heads are ranked by how much the predictions change without each, on one half of the
held-out digits; the accuracy is that on the other half, with a quarter of the heads removed. Shown in small if, for every seed,
removing the most important heads costs more accuracy than removing random ones (mean of ten orders), and removing the least
important ones costs less than removing random ones; contradicted if the seeds agree on the opposite of either.
"""

from functools import partial

import torch
from transformers import ViTConfig, ViTForImageClassification

from ...analysis.vit.hops import Grid
from ...analysis.vit.layout import ViTLayout
from ...analysis.vit.pruning import PruningSums, cumulative_removal
from ..pictures import SIZE, load, train_classifier
from ..result import Conclusion, Figure, agreement
from ..training import tuned


LAYERS, HEADS = 4, 6
ORDERS = ("the most important first", "in random order", "the least important first")


def measure(work) -> dict:
    steps, random_orders = (3, 2) if work.miniature else (500, 10)
    return {"runs": tuned(work, "vit", partial(train_and_prune, steps, random_orders))}


def vit(num_classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=8,
            num_channels=1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_labels=num_classes,
            initializer_range=0.1,
        )
    )


def train_and_prune(steps: int, random_orders: int, seed: int, rate: float) -> dict:
    """Accuracy in percent after the removal of 0, 1, 2... heads, in each order."""
    model, result = train_classifier(vit, "digits", steps, seed, rate)
    layout, (pixels, labels) = ViTLayout.of(model.eval()), load("digits")["test"]
    half = len(pixels) // 2
    grid = layout.grid_of(pixels)
    ranking = rank(layout, pixels[:half], grid)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [[ranking[i] for i in torch.randperm(len(ranking), generator=generator)] for _ in range(random_orders)]
    batches = [(pixels[half:], labels[half:])]
    curves = {}
    for name, orders in zip(ORDERS, ([ranking], shuffled, [ranking[::-1]]), strict=True):
        found = [
            [
                100 * (predicted == labels[half:]).float().mean().item()
                for predicted in cumulative_removal(layout, batches, order, range(len(ranking) + 1), grid)
            ]
            for order in orders
        ]
        curves[name] = [sum(points) / len(points) for points in zip(*found, strict=True)]
    return {**result, "curves": curves}


def rank(layout: ViTLayout, pixels: torch.Tensor, grid: Grid) -> list[tuple[int, int]]:
    """Layers and heads, starting with the head whose removal changes the predictions most (Jensen-Shannon divergence)."""
    sums = PruningSums(layout, grid, keep_one=False)
    sums.add(pixels)
    importance = sums.leave_one_out["jsd"].mean(-1)
    return [divmod(index, HEADS) for index in importance.flatten().argsort(descending=True).tolist()]


def conclude(data: dict) -> Conclusion:
    removed = LAYERS * HEADS // 4
    worst, random, best = ([run["curves"][name][removed] for run in data["runs"]] for name in ORDERS)
    full = [run["curves"][ORDERS[0]][0] for run in data["runs"]]
    figures = (
        Figure.of(
            f"accuracy without the {removed} most important of {LAYERS * HEADS} heads",
            "%",
            worst,
            "random heads",
            random,
        ),
        Figure.of(f"accuracy without the {removed} least important heads", "%", best, "random heads", random),
        Figure.of("accuracy with all heads", "%", full),
    )
    orders = agreement(random, worst), agreement(best, random)
    words = {1: "all seeds agree", 0: "the seeds do not agree", -1: "all seeds say the opposite"}
    why = (
        f"That the heads which pruning ranks first matter more than random ones: {words[orders[0]]}; that the last ones matter less: "
        f"{words[orders[1]]}."
    )
    if min(orders) < 0:
        return Conclusion(figures, "contradicted here", why)
    return Conclusion(figures, "shown in small" if orders == (1, 1) else "not shown here", why)


def draw(data: dict, figure) -> None:
    axes = figure.subplots()
    for name, color in zip(ORDERS, ("tab:red", "tab:grey", "tab:green"), strict=True):
        curves = [run["curves"][name] for run in data["runs"]]
        for curve in curves:
            axes.plot(curve, color=color, alpha=0.3, linewidth=1)
        axes.plot([sum(points) / len(points) for points in zip(*curves, strict=True)], color=color, label=name)
    axes.set(xlabel=f"heads removed, of {LAYERS * HEADS}", ylabel="accuracy on digits in %")
    axes.legend()
