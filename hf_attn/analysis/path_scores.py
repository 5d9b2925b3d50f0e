"""How much each path of a path ensemble contributes to the prediction (arXiv 2308.06548)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from .figures import new_figure


@dataclass(frozen=True)
class PathScores:
    """Accuracy of the paths of a model.

    Attributes:
        names: a name for each path.
        ensemble: accuracy of the ensemble.
        alone: accuracy of each path alone, `(paths,)`.
        without: accuracy of the ensemble without each path, `(paths,)`; equal to `ensemble` for pruned paths.
        num_samples: number of images.
    """

    names: tuple[str, ...]
    ensemble: float
    alone: torch.Tensor
    without: torch.Tensor
    num_samples: int

    @property
    def gain(self) -> torch.Tensor:
        """What each path adds to the accuracy of the ensemble, `(paths,)`; negative for one that pulls it down."""
        return self.ensemble - self.without

    @property
    def ranking(self) -> list[int]:
        """Paths in the order in which they should be pruned: by gain, the lowest first."""
        return self.gain.sort(stable=True).indices.tolist()

    def __str__(self) -> str:
        """A table with a line for each path."""
        width = max(len(name) for name in self.names)
        lines = [
            f"Accuracy of the ensemble: {self.ensemble:.2%} on {self.num_samples} images",
            f"{'path':{width}}   alone  without    gain",
        ]
        for name, alone, without, gain in zip(
            self.names, self.alone.tolist(), self.without.tolist(), self.gain.tolist(), strict=True
        ):
            lines.append(f"{name:{width}}  {alone:6.2%}   {without:6.2%}  {gain:+6.2%}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the accuracy of each path alone and of the ensemble without it.

        Args:
            path: file to write; its suffix sets the format.

        Raises:
            ImportError: if matplotlib (the extra `plot`) is not installed.
        """
        positions = list(range(len(self.names)))
        figure = new_figure(max(6, 0.45 * len(positions) + 2), 6.5)
        upper, lower = figure.subplots(2, sharex=True)
        upper.bar(positions, [100 * value for value in self.alone.tolist()], color="tab:blue", label="path alone")
        upper.axhline(100 * self.ensemble, color="black", linestyle="--", linewidth=1, label="ensemble")
        upper.set(ylabel="accuracy in %", ylim=(0, 100))
        upper.set_title(f"Paths on {self.num_samples} images", loc="left")
        upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        gains = [100 * value for value in self.gain.tolist()]
        colors = ["tab:green" if gain >= 0 else "tab:red" for gain in gains]
        lower.bar(positions, gains, color=colors)
        lower.axhline(0, color="black", linewidth=1)
        lower.set(ylabel="gain in percentage points")
        lower.set_title("Accuracy of the ensemble with the path minus without it", loc="left")
        lower.set_xticks(positions, self.names, rotation=90)
        figure.savefig(path, dpi=150)


@torch.no_grad()
def path_scores(
    model: PreTrainedModel, dataset: Iterable[Mapping[str, Any]], batch_size: int = 32, progress: bool = True
) -> PathScores:
    """Score each path of a path ensemble on a data set.

    Runs one forward pass for each batch, in eval mode; the mode of the model is restored afterwards.

    Args:
        model: a `PathEnsembleForImageClassification`.
        dataset: samples with `pixel_values` `(channels, height, width)` and `labels`, the index of a class.
        batch_size: number of samples of a forward pass.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the model has no paths, or if the data set is empty or has no labels.
    """
    if not hasattr(model, "path_logits"):
        raise ValueError(
            f"{type(model).__name__} has no paths. Make a path ensemble of it: "
            "`PathEnsembleForImageClassification.from_base(model)`."
        )
    was_training = model.training
    model.eval()
    try:
        hits, count = 0, 0
        for batch in tqdm(_batches(dataset, batch_size), desc="Path scores", unit="batch", disable=not progress):
            if "labels" not in batch:
                raise ValueError(
                    f"The samples have no labels, only {', '.join(batch)}: there is nothing to compare with."
                )
            labels = batch["labels"].to(model.device)
            logits = model.path_logits(batch["pixel_values"].to(model.device))
            scores = torch.cat([logits.ensemble[None], logits.alone, logits.without])
            hits = hits + (scores.argmax(dim=-1) == labels).sum(dim=-1).cpu()
            count += len(labels)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("The data set is empty: there is nothing to score the paths on.")
    accuracy = hits.float() / count
    paths = model.config.num_paths
    return PathScores(
        names=tuple(model.config.path_names),
        ensemble=accuracy[0].item(),
        alone=accuracy[1 : paths + 1],
        without=accuracy[paths + 1 :],
        num_samples=count,
    )


def _batches(dataset: Iterable[Mapping[str, Any]], batch_size: int):
    samples = []
    for sample in dataset:
        samples.append(sample)
        if len(samples) == batch_size:
            yield default_data_collator(samples)
            samples = []
    if samples:
        yield default_data_collator(samples)
