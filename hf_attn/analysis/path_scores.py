"""How much each path of a path ensemble contributes to the prediction (arXiv 2308.06548)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from .figures import new_figure


#: label of samples that are left out, as in the losses of torch
IGNORED = -100


@dataclass(frozen=True)
class PathScores:
    """Accuracy of the paths of a model.

    Attributes:
        names: a name for each path.
        ensemble: accuracy of the ensemble.
        alone: accuracy of each path alone, `(paths,)`.
        without: accuracy of the ensemble without each path, `(paths,)`; equal to `ensemble` for pruned paths.
        num_samples: number of images that were counted.
    """

    names: tuple[str, ...]
    ensemble: float
    alone: torch.Tensor
    without: torch.Tensor
    num_samples: int

    @property
    def gain(self) -> torch.Tensor:
        """Gain in accuracy of the ensemble by each path, `(paths,)`; negative if the path decreases it."""
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
    """Score each path of a path ensemble on a dataset.

    Runs one forward pass for each batch, in eval mode; the mode of the model is restored afterwards.

    Args:
        model: a `PathEnsembleForImageClassification`.
        dataset: samples with `pixel_values` `(channels, height, width)` and `labels`, the index of a class; those with the
            label -100 are left out.
        batch_size: number of samples of a forward pass.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the model has no paths, if the dataset is empty or has no labels, or if a label is not a class.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not hasattr(model, "path_logits"):
        raise ValueError(
            f"{type(model).__name__} has no paths. Convert it: `PathEnsembleForImageClassification.from_base(model)`."
        )
    was_training = model.training
    model.eval()
    try:
        hits, count = 0, 0
        for batch in tqdm(_batches(dataset, batch_size), desc="Path scores", unit="batch", disable=not progress):
            labels = batch["labels"].to(model.device)
            _check_labels(labels, model.config.num_labels)
            counted = labels != IGNORED
            logits = model.path_logits(batch["pixel_values"].to(model.device))
            scores = torch.cat([logits.ensemble[None], logits.alone, logits.without])
            hits = hits + (scores.argmax(dim=-1) == labels)[:, counted].sum(dim=-1).cpu()
            count += int(counted.sum())
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("The dataset is empty, or all its labels are -100: there is nothing to score the paths on.")
    accuracy = hits.float() / count
    paths = model.config.num_paths
    return PathScores(
        names=tuple(model.config.path_names),
        ensemble=accuracy[0].item(),
        alone=accuracy[1 : paths + 1],
        without=accuracy[paths + 1 :],
        num_samples=count,
    )


def _check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raise an error for labels that are not classes, which would count as errors of the model."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"A label must be the integer index of one class; got {labels.dtype} of shape {tuple(labels.shape)}, "
            f"such as {labels.flatten()[:1].tolist()}."
        )
    outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(outside):
        raise ValueError(
            f"Label {outside[0].item()} is out of range: the model has classes 0 to {num_classes - 1}. A label of "
            f"{IGNORED} leaves a sample out."
        )


def _batches(dataset: Iterable[Mapping[str, Any]], batch_size: int):
    samples = []
    for number, sample in enumerate(dataset):
        missing = [name for name in ("pixel_values", "labels") if name not in sample]
        if missing:
            raise ValueError(
                f"Sample {number} has no {' and no '.join(missing)}, only {', '.join(sample)}: there is nothing to compare."
            )
        # Other columns, such as file names, may not be collatable.
        samples.append({name: sample[name] for name in ("pixel_values", "labels")})
        if len(samples) == batch_size:
            yield default_data_collator(samples)
            samples = []
    if samples:
        yield default_data_collator(samples)
