"""Compare an image model with existing implementations of other models, on digits and on textures."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .drawing import bars
from .pictures import DATASETS, SIZE, num_classes, train_classifier
from .result import Conclusion, Figure, agreement
from .training import operations, tuned


class ImageContest:
    """`measure`, `conclude` and `draw` of the claim that a model classifies better than its peers.

    Shown in small if, against every peer, all seeds agree on at least one of the two datasets, and on neither do all seeds
    find the opposite; contradicted if against some peer all seeds find the opposite on both datasets; otherwise not shown here.

    Args:
        sides: name of a model -> function that makes it for a number of classes; the paper's model comes first.
        same_cost: whether the models must need the same number of operations, with a tolerance of a tenth.
        steps: training steps of each run.
    """

    def __init__(self, sides: Mapping[str, Callable[[int], nn.Module]], same_cost: bool = True, steps: int = 1000):
        self.sides, self.same_cost, self.steps = dict(sides), same_cost, steps
        self.own, *self.peers = self.sides

    def measure(self, work) -> dict[str, Any]:
        """Operations of each model, and its accuracy on both datasets for each seed."""
        cost = {name: cost_of(make) for name, make in self.sides.items()}
        for name in self.peers if self.same_cost else ():
            if not 0.9 <= cost[name] / cost[self.own] <= 1.1:
                raise RuntimeError(f"{name} needs {cost[name]} operations and {self.own} {cost[self.own]}.")
        steps = 3 if work.miniature else self.steps
        found = {
            dataset: {
                name: tuned(work, f"{dataset}-{_file_name(name)}", partial(self.run, make, dataset, steps))
                for name, make in self.sides.items()
            }
            for dataset in DATASETS
        }
        return {"operations": cost, "runs": found}

    @staticmethod
    def run(make_model, dataset: str, steps: int, seed: int, rate: float) -> dict[str, float]:
        return train_classifier(make_model, dataset, steps, seed, rate)[1]

    def conclude(self, data: dict[str, Any]) -> Conclusion:
        """The verdict by the rule of the class."""
        figures, orders = [], {}
        for dataset, sides in data["runs"].items():
            own = accuracies(sides[self.own])
            for peer in self.peers:
                others = accuracies(sides[peer])
                figures.append(Figure.of(f"accuracy on {dataset}", "%", own, peer, others))
                orders.setdefault(peer, {})[dataset] = agreement(own, others)
        for peer in self.peers:
            cost = data["operations"]
            figures.append(Figure.of("operations", "million", cost[self.own] / 1e6, peer, cost[peer] / 1e6))
        words = {1: "higher", 0: "not clearly different", -1: "lower"}
        why = "; ".join(
            f"against {peer} the accuracy is "
            + " and ".join(f"{words[order]} on {dataset}" for dataset, order in found.items())
            for peer, found in orders.items()
        )
        verdict = "not shown here"
        if all(max(found.values()) > 0 and min(found.values()) >= 0 for found in orders.values()):
            verdict = "shown in small"
        elif any(max(found.values()) < 0 for found in orders.values()):
            verdict = "contradicted here"
        return Conclusion(tuple(figures), verdict, why[0].upper() + why[1:] + ".")

    @staticmethod
    def draw(data: dict[str, Any], figure) -> None:
        """Bar charts of the accuracies on both datasets."""
        for axes, (dataset, sides) in zip(figure.subplots(1, len(data["runs"])), data["runs"].items(), strict=True):
            names = {
                f"{name.removesuffix(' of timm')}\n{data['operations'][name] / 1e6:.2f} M\noperations": accuracies(
                    runs
                )
                for name, runs in sides.items()
            }
            bars(axes, names, "accuracy in %", dataset)
            axes.tick_params(axis="x", labelsize=8)


def accuracies(runs: list[dict[str, float]]) -> list[float]:
    """Accuracy of each seed, in percent."""
    return [run["accuracy"] for run in runs]


def cost_of(make_model: Callable[[int], nn.Module]) -> int:
    """Operations for one image."""
    torch.manual_seed(0)
    return operations(make_model(num_classes("digits")), torch.zeros(1, 1, SIZE, SIZE))


def vit(num_classes: int, width: int = 64, depth: int = 4, mlp_ratio: float = 2, patch_size: int = 8) -> nn.Module:
    """A ViT of timm for greyscale images."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        SIZE, patch_size, 1, num_classes, embed_dim=width, depth=depth, num_heads=4, mlp_ratio=mlp_ratio
    )


def swin(num_classes: int, width: int = 30) -> nn.Module:
    """A Swin of timm for greyscale images: two stages of two blocks, windows of 4 x 4."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        SIZE, 4, 1, num_classes, embed_dim=width, depths=(2, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2
    )


def _file_name(name: str) -> str:
    return name.lower().replace(" ", "-")
