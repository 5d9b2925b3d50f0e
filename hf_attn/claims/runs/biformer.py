"""BiFormer: the number of operations of routed attention against dense attention, and the accuracy against Swin.

Shown in small if at 896 pixels its attention needs less than half of what dense attention in the same network needs, and `ImageContest` finds
its accuracy higher than that of a Swin of timm with the same number of operations. Otherwise the verdict on accuracy decides.
All have the same short training, at whose end Swin is still learning.
"""

from dataclasses import replace

import torch

from ...modeling.biformer.configuration_biformer import BiFormerConfig
from ...modeling.biformer.modeling_biformer import BiFormerForImageClassification
from ..contest import SIZE, ImageContest, swin
from ..drawing import bars
from ..result import Conclusion, Figure
from ..training import operations


#: image sizes at which each of the 7 x 7 regions of BiFormer-T has a whole number of positions
PIXELS, REGIONS = (224, 448, 896), 49
FULL = {"topks": [REGIONS, REGIONS, REGIONS, -2]}


def biformer(num_classes: int) -> BiFormerForImageClassification:
    return BiFormerForImageClassification(
        BiFormerConfig(
            image_size=SIZE,
            num_channels=1,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            mlp_ratios=[2, 2],
            n_win=[4, 2],
            topks=[4, 2],
            head_dim=16,
            num_labels=num_classes,
        )
    )


_contest = ImageContest({"BiFormer": biformer, "Swin of timm": lambda classes: swin(classes, width=28)})


def measure(work) -> dict:
    sizes = PIXELS[:2] if work.miniature else PIXELS
    counts = [[pixels, count(pixels), count(pixels, **FULL)] for pixels in sizes]
    return {**_contest.measure(work), "counts": counts}


def count(pixels: int, **fields) -> float:
    """Billions of operations of BiFormer-T for one image."""
    with torch.device("meta"):
        model = BiFormerForImageClassification(BiFormerConfig.from_variant("biformer_tiny", **fields))
        return operations(model, torch.zeros(1, 3, pixels, pixels)) / 1e9


def conclude(data: dict) -> Conclusion:
    conclusion, (pixels, routed, full) = _contest.conclude(data), data["counts"][-1]
    cost = Figure.of(
        f"operations of BiFormer-T at {pixels} pixels", "billion", routed, "attending to all regions", full
    )
    verdict, share = conclusion.verdict, routed / full
    if verdict == "shown in small" and share >= 0.5:
        verdict = "not shown here"
    return replace(
        conclusion,
        figures=(cost, *conclusion.figures),
        verdict=verdict,
        why=f"At {pixels} pixels it needs {share:.0%} of the operations of dense attention. {conclusion.why}",
    )


def draw(data: dict, figure) -> None:
    axes = figure.subplots(1, 1 + len(data["runs"]), width_ratios=(4, 3, 3))
    for column, name, style in ((2, "all regions", "s--"), (1, "routed", "o-")):
        points = [(row[0], row[column]) for row in data["counts"]]
        axes[0].loglog(*zip(*points, strict=True), style, label=name)
    axes[0].set_xticks([row[0] for row in data["counts"]], [str(row[0]) for row in data["counts"]])
    axes[0].tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].set_xlabel("pixels of a side")
    axes[0].set_ylabel("billion operations")
    axes[0].set_title("BiFormer-T")
    axes[0].legend(fontsize=8)
    for panel, (dataset, sides) in zip(axes[1:], data["runs"].items(), strict=True):
        names = {name.removesuffix(" of timm"): [run["accuracy"] for run in runs] for name, runs in sides.items()}
        bars(panel, names, "accuracy in %", dataset)
