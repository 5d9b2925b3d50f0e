"""How much the attention maps of a model's layers resemble each other, and which layers could share one.

The measure and the choice of layers are those of EchoAtt (arXiv 2409.14595, section 3): the similarity of two layers is
the mean over samples of the cosine between their maps, flattened over heads and both token axes; the score of a layer is
its mean similarity with all others.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .figures import new_figure
from .recording import attention_maps


@dataclass(frozen=True)
class AttentionSimilarity:
    """Similarity of the attention maps of a model's layers.

    Attributes:
        similarity: `(layers, layers)`, float32, symmetric with ones on the diagonal.
        num_samples: number of sequences that were averaged over.
    """

    similarity: torch.Tensor
    num_samples: int

    @classmethod
    def from_maps(cls, samples: Iterable[Sequence[torch.Tensor]]) -> "AttentionSimilarity":
        """Measure recorded maps.

        Args:
            samples: for each forward pass the maps of all layers, each `(batch, heads, q_len, kv_len)`, or without the
                batch dimension.

        Raises:
            ValueError: if there is no sample, if the maps of the layers have different shapes, or if a map is empty or not
                finite.
        """
        total, count = 0.0, 0
        for maps in samples:
            shapes = sorted({tuple(layer.shape) for layer in maps})
            if len(shapes) != 1:
                raise ValueError(
                    f"The attention maps of the layers cannot be compared because their shapes differ: {shapes}."
                )
            if 0 in shapes[0]:
                raise ValueError(f"An attention map is empty (shape {shapes[0]}): the sample has no tokens.")
            if len(shapes[0]) == 3:
                maps = [layer[None] for layer in maps]
            for sequence in range(maps[0].shape[0]):
                total = total + _cosines([layer[sequence] for layer in maps])
                count += 1
        if count == 0:
            raise ValueError("The dataset is empty: there is nothing to measure the similarity on.")
        similarity = ((total + total.T) / (2 * count)).clamp(max=1.0)
        return cls(similarity.fill_diagonal_(1.0).float(), count)

    @property
    def num_layers(self) -> int:
        return self.similarity.shape[0]

    @property
    def scores(self) -> torch.Tensor:
        """Mean similarity of each layer with all other layers, `(layers,)`; 0 for a single layer."""
        return (self.similarity.sum(dim=-1) - self.similarity.diagonal()) / max(1, self.num_layers - 1)

    @property
    def untouched_ends(self) -> tuple[int, int]:
        """Numbers of first and of last layers that should keep their own attention.

        The sorted scores are cut at their largest gap; the layers below it stay untouched as far as they form a run at
        the start or at the end of the model.
        """
        ordered = self.scores.sort().values
        gaps = ordered.diff()
        if not gaps.any():
            return 0, 0
        low = (self.scores <= ordered[gaps.argmax()]).tolist()
        return low.index(False), low[::-1].index(False)

    @property
    def ranking(self) -> list[int]:
        """Layers by descending score, without layer 0, which has no earlier layer to share with."""
        order = self.scores.sort(descending=True, stable=True).indices.tolist()
        return [layer for layer in order if layer != 0]

    def shared_layers(self, *, block_size: int | None = None, num_shared: int | None = None) -> list[int]:
        """Propose layers that use the attention map of an earlier layer; exactly one argument is needed.

        Args:
            block_size: cut the layers between the untouched ends into blocks of this many, the last of which may be
                shorter; all but the first layer of a block share.
            num_shared: choose this many, one after the other: always the layer after which all shared layers together
                resemble the layers whose maps they use the most. The score, which the paper ranks by, is about all other
                layers, of which only one gives its map; on SmolLM2-135M with 12 of 30 layers shared the perplexity
                before distillation is 66 by this choice and 142 by the highest scores (18.7 for the base).

        Returns:
            Layers counted from 0, in ascending order.

        Raises:
            ValueError: if not exactly one argument is given, or if it is out of range.
        """
        if (block_size is None) == (num_shared is None):
            raise ValueError("Give exactly one of block_size and num_shared.")
        if num_shared is not None:
            if not 0 <= num_shared < self.num_layers:
                raise ValueError(f"num_shared must be between 0 and {self.num_layers - 1}, got {num_shared}.")
            return self._most_replaceable(num_shared)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        prefix, suffix = self.untouched_ends
        inner = range(prefix, self.num_layers - suffix)
        return [layer for layer in inner if (layer - prefix) % block_size != 0]

    def _most_replaceable(self, num_shared: int) -> list[int]:
        shared: set[int] = set()
        while len(shared) < num_shared:
            others = [layer for layer in range(1, self.num_layers) if layer not in shared]
            shared.add(max(others, key=lambda layer: self._similarity_to_sources(shared | {layer})))
        return sorted(shared)

    def _similarity_to_sources(self, shared: set[int]) -> float:
        total, source = 0.0, 0
        for layer in range(1, self.num_layers):
            if layer in shared:
                total += self.similarity[layer, source].item()
            else:
                source = layer
        return total

    def __str__(self) -> str:
        """A table with a line for each layer."""
        prefix, suffix = self.untouched_ends
        lines = [
            f"Attention similarity of {self.num_layers} layers, mean over {self.num_samples} sequences",
            "layer  score  with the layer before  proposal",
        ]
        for layer, score in enumerate(self.scores.tolist()):
            before = f"{self.similarity[layer, layer - 1]:.3f}" if layer else "-"
            inner = max(prefix, 1) <= layer < self.num_layers - suffix
            lines.append(f"{layer:5d}  {score:.3f}  {before:>21}  {'can share' if inner else 'keep its own'}")
        return "\n".join(lines)

    def plot(self, path: str | Path, shared_layers: Sequence[int] = ()) -> None:
        """Draw the similarity as a heat map.

        Args:
            path: file to write; its suffix sets the format.
            shared_layers: layers to mark on both axes.

        Raises:
            ImportError: if matplotlib (the extra `plot`) is not installed.
        """
        figure = new_figure(7, 6)
        axes = figure.add_subplot()
        image = axes.imshow(self.similarity.numpy(), cmap="viridis", vmin=0, vmax=1, origin="lower")
        figure.colorbar(image, ax=axes, label="cosine similarity of attention maps")
        ticks = range(0, self.num_layers, max(1, self.num_layers // 15))
        axes.set(xlabel="layer", ylabel="layer", xticks=ticks, yticks=ticks, title="Attention similarity of layers")
        if shared_layers:
            marks = list(shared_layers)
            axes.plot(marks, marks, "rx", markersize=5, label="shares an earlier layer's map")
            axes.legend(loc="lower right")
        figure.savefig(path, dpi=150)


def attention_similarity(
    model: PreTrainedModel,
    dataset: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 512,
    progress: bool = True,
) -> AttentionSimilarity:
    """Measure how similar the attention maps of a model's layers are.

    Runs one forward pass for each sample and keeps only the running mean. The model computes with
    `attn_implementation="eager"`, the one that returns maps, and in eval mode; both are restored afterwards. The paper
    uses samples of exactly 512 tokens.

    Args:
        model: a decoder or an encoder of transformers.
        dataset: samples without padding. A sample is a tensor or a list of token ids `(sequence,)` or
            `(batch, sequence)`, a dictionary of the model's inputs with or without a batch dimension (such as a row of a
            `datasets.Dataset`; labels are ignored), or a text.
        tokenizer: needed for texts.
        max_length: texts are cut to this many tokens.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the model returns no attention maps, a sample is padded, or the dataset is empty or holds something
            else.
    """

    maps = attention_maps(model, dataset, tokenizer, max_length, "Attention similarity", progress)
    return AttentionSimilarity.from_maps(maps)


def _cosines(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cosines between the maps of one sequence, `(layers, layers)` in float64 on the CPU.

    A map has `heads * tokens**2` numbers, whose sum in float32 would be off by a few thousandths.
    """
    # The numbers of one row of attention, of all heads, at a time: in float64 whole maps would take twice their memory.
    products = 0.0
    for rows in zip(*(layer.split(64, dim=-2) for layer in layers), strict=True):
        flat = torch.stack([row.flatten() for row in rows])
        flat = (flat.cpu() if flat.device.type == "mps" else flat).double()
        products = products + flat @ flat.T
    products = products.cpu()
    for layer, square in enumerate(products.diagonal().tolist()):
        if not math.isfinite(square) or square == 0:
            raise ValueError(
                f"The attention map of layer {layer} is {'empty' if square == 0 else 'not finite'}: there is no similarity "
                "with it. Look for NaN in the weights of the model or in its inputs."
            )
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)
