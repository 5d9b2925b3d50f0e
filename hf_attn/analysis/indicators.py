"""Indicators of attention maps (arXiv 2510.11602): how spread, concentrated, local and diverse they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .entropy import attention_entropy
from .figures import new_figure
from .recording import attention_maps


#: distances whose focus is measured
DISTANCES = (0, 1, 2, 3)


def attention_indicators(attention: torch.Tensor) -> dict[str, torch.Tensor]:
    """Indicators of each map.

    Args:
        attention: probabilities `(..., length, length)`.

    Returns:
        `(...)` each: `entropy`, `-sum a log a` over the whole map in nats; `concentration`, its Frobenius norm; `sink`, the mean
        weight of the first token; `focus_N`, the mean weight of the token N before (NaN for maps that are not longer than N).
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    indicators = {
        "entropy": attention_entropy(attention).sum(-1),
        "concentration": torch.linalg.matrix_norm(attention),
        "sink": attention[..., 0].mean(-1),
    }
    for distance in DISTANCES:
        indicators[f"focus_{distance}"] = attention.diagonal(-distance, -2, -1).mean(-1)
    return indicators


def head_diversity(attention: torch.Tensor) -> torch.Tensor:
    """How much heads differ: the standard deviation over heads of each entry, averaged over the lower triangle.

    Args:
        attention: `(..., heads, length, length)`.

    Returns:
        `(...)`.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    length = attention.shape[-1]
    spread = attention.std(-3, correction=0).tril()
    return spread.sum((-2, -1)) * 2 / (length * (length + 1))


@dataclass(frozen=True)
class AttentionIndicators:
    """Indicators of the attention maps of a model.

    Attributes:
        by_head: indicator of [`attention_indicators`] -> for each map the mean over sequences, `(heads,)`.
        diversity: [`head_diversity`] of each map, mean over sequences.
        layers: number of the layer of each map.
        num_samples: number of sequences.
    """

    by_head: dict[str, tuple[torch.Tensor, ...]]
    diversity: tuple[float, ...]
    layers: tuple[int, ...]
    num_samples: int

    @classmethod
    def from_maps(
        cls, samples: Iterable[Sequence[torch.Tensor]], layers: Sequence[int] | None = None
    ) -> "AttentionIndicators":
        """Measure recorded maps.

        Args:
            samples: for each forward pass the maps of all layers, `(batch, heads, length, length)`.
            layers: number of the layer of each map; 0, 1, 2... if not given.

        Raises:
            ValueError: if there is no sample, if a map is not square, or if `layers` does not fit.
        """
        totals: list[dict[str, torch.Tensor]] = []
        count = 0
        for maps in samples:
            totals = totals or [{} for _ in maps]
            for total, attention in zip(totals, maps, strict=True):
                if attention.dim() != 4 or attention.shape[-1] != attention.shape[-2]:
                    raise ValueError(
                        "Indicators need self-attention maps of shape (batch, heads, length, length), got shape "
                        f"{tuple(attention.shape)}."
                    )
                measured = attention_indicators(attention) | {"diversity": head_diversity(attention)}
                for name, value in measured.items():
                    total[name] = total.get(name, 0.0) + value.sum(0).double().cpu()
            count += maps[0].shape[0]
        if count == 0:
            raise ValueError("The dataset is empty: there is nothing to measure.")
        layers = range(len(totals)) if layers is None else layers
        if len(layers) != len(totals):
            raise ValueError(
                f"The model returns {len(totals)} maps, but layers has {len(layers)} names: {list(layers)}."
            )
        diversity = tuple((total.pop("diversity") / count).item() for total in totals)
        by_head = {name: tuple((total[name] / count).float() for total in totals) for name in totals[0]}
        return cls(by_head, diversity, tuple(layers), count)

    def by_layer(self) -> dict[str, list[float]]:
        """Mean over heads of each indicator, and the diversity, for each map."""
        means = {name: [heads.mean().item() for heads in maps] for name, maps in self.by_head.items()}
        return means | {"diversity": list(self.diversity)}

    def __str__(self) -> str:
        """A table with a line for each map."""
        columns = self.by_layer()
        lines = [
            f"Attention indicators of {len(self.layers)} maps, mean over heads and {self.num_samples} sequences",
            "layer  " + "  ".join(f"{name:>13}" for name in columns),
        ]
        for index, layer in enumerate(self.layers):
            lines.append(f"{layer:5d}  " + "  ".join(f"{column[index]:13.4g}" for column in columns.values()))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw each indicator by layer: the mean over heads, and the range of heads behind it.

        Args:
            path: file to write; its suffix sets the format.

        Raises:
            ImportError: if matplotlib (the extra `plot`) is not installed.
        """
        columns = self.by_layer()
        figure = new_figure(12, 5.5)
        panels = figure.subplots(2, (len(columns) + 1) // 2, sharex=True).flat
        for axes, (name, means) in zip(panels, columns.items(), strict=False):
            if name in self.by_head:
                lowest, highest = (
                    [extreme(heads).item() for heads in self.by_head[name]] for extreme in (torch.min, torch.max)
                )
                axes.fill_between(self.layers, lowest, highest, alpha=0.25)
            axes.plot(self.layers, means, marker=".")
            axes.set(title=name.replace("_", " "), xlabel="layer")
        for axes in list(panels)[len(columns) :]:
            axes.set_visible(False)
        figure.suptitle("Attention indicators: mean and range of heads")
        figure.savefig(path, dpi=150)


def measure_attention(
    model: PreTrainedModel,
    dataset: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: Sequence[int] | None = None,
    max_length: int = 512,
    progress: bool = True,
) -> AttentionIndicators:
    """Measure the attention maps of a model.

    Args:
        model: any transformers model that returns maps; its state is restored afterwards.
        dataset: samples without padding, as in [`~hf_attn.analysis.attention_similarity`].
        tokenizer: needed for texts.
        layers: number of the layer of each map, if some layers have none; 0, 1, 2... if not given.
        max_length: texts are cut to this many tokens.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the model returns no attention maps, or the dataset is empty or holds something else.
    """
    maps = attention_maps(model, dataset, tokenizer, max_length, "Attention indicators", progress)
    return AttentionIndicators.from_maps(maps, layers)
