"""Paths of a trained ViT: accuracy without the worst ones, and without as many random ones.

A ViT of transformers learns digits and textures. Paths are ranked by what they add to the accuracy on the validation part, as `path_scores`
does; the accuracy is that on the test part, without a quarter of the paths. Shown in small if on both datasets pruning the worst loses at
most half a point in the mean over seeds, and all seeds agree that random ones (mean of twenty draws) lose more. Contradicted if on
both datasets the seeds agree that random ones lose less.
"""

from functools import partial
from statistics import fmean

import torch
from transformers import ViTConfig, ViTForImageClassification

from ...analysis.path_scores import path_scores
from ...modeling.path_ensemble.modeling_path_ensemble import PathEnsembleForImageClassification
from ..pictures import DATASETS, SIZE, Pictures, load, train_classifier
from ..result import Conclusion, Figure, agreement
from ..training import loss_and_accuracy, tuned


LAYERS = 6
#: each layer has one path through attention and one through the MLP; the embeddings are one more path
PATHS = 2 * LAYERS + 1
PRUNED = PATHS // 4
#: loss of accuracy, in percentage points, that counts as harmless
TOLERANCE = 0.5


def measure(work) -> dict:
    steps, draws = (3, 2) if work.miniature else (300, 20)
    return {
        "runs": {
            dataset: tuned(work, dataset, partial(train_and_prune, dataset, steps, draws)) for dataset in DATASETS
        }
    }


def vit(num_classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=8,
            num_channels=1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_labels=num_classes,
            initializer_range=0.1,
        )
    )


def train_and_prune(dataset: str, steps: int, draws: int, seed: int, rate: float) -> dict:
    """Accuracy in percent after pruning 0, 1, 2... paths, up to half of them."""
    base, result = train_classifier(vit, dataset, steps, seed, rate)
    model = PathEnsembleForImageClassification.from_base(base, granularity="branch").eval()
    validation, test = load(dataset)["validation"], load(dataset)["test"]
    samples = [{"pixel_values": pixels, "labels": int(label)} for pixels, label in zip(*validation, strict=True)]
    ranking = path_scores(model, samples, batch_size=64, progress=False).ranking
    if len(ranking) != PATHS:
        raise RuntimeError(f"There are {len(ranking)} paths, not {PATHS}.")
    generator = torch.Generator().manual_seed(seed)
    counts = range(PATHS // 2 + 1)
    random = [torch.randperm(PATHS, generator=generator).tolist() for _ in range(draws)]
    return {
        **result,
        "worst": [accuracy_without(model, ranking[:count], test) for count in counts],
        "random": [fmean(accuracy_without(model, order[:count], test) for order in random) for count in counts],
    }


def accuracy_without(model: PathEnsembleForImageClassification, paths: list[int], pictures: Pictures) -> float:
    model.prune(paths)
    return loss_and_accuracy(model, *pictures)[1]


def conclude(data: dict) -> Conclusion:
    figures, losses, orders = [], [], []
    for dataset, runs in data["runs"].items():
        worst, random = ([run[side][PRUNED] for run in runs] for side in ("worst", "random"))
        full = [run["worst"][0] for run in runs]
        figures.append(
            Figure.of(
                f"accuracy on {dataset} without the {PRUNED} worst of {PATHS} paths",
                "%",
                worst,
                "random paths",
                random,
            )
        )
        figures.append(Figure.of(f"accuracy on {dataset} with all paths", "%", full))
        losses.append(fmean(full) - fmean(worst))
        orders.append(agreement(worst, random))
    words = {1: "worse", 0: "not clearly worse", -1: "better"}
    why = "; ".join(
        f"without the worst paths the accuracy on {dataset} changes by {-loss:+.1f} points, and without random ones it is {words[order]}"
        for dataset, loss, order in zip(data["runs"], losses, orders, strict=True)
    )
    verdict = "not shown here"
    if max(losses) <= TOLERANCE and min(orders) == 1:
        verdict = "shown in small"
    elif max(orders) < 0:
        verdict = "contradicted here"
    return Conclusion(tuple(figures), verdict, why[0].upper() + why[1:] + ".")


def draw(data: dict, figure) -> None:
    panels = figure.subplots(1, len(data["runs"]))
    for axes, (dataset, runs) in zip(panels, data["runs"].items(), strict=True):
        for side, color in (("worst", "tab:green"), ("random", "tab:red")):
            for index, run in enumerate(runs):
                label = None if index else f"the {side} first" if side == "worst" else "random ones"
                axes.plot(run[side], "o-", color=color, alpha=0.6, markersize=3, label=label)
        axes.set(xlabel=f"paths pruned, of {PATHS}", title=dataset)
    panels[0].set_ylabel("accuracy in %")
    panels[0].legend()
