"""Everything that was measured about the attention of a vision transformer, as tables, figures and a report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...training.output_folder import OutputFolderError
from .hops import AttentionStrength, Grid, attention_strength, offset_map
from .patterns import HeadClusters, cluster_heads


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass
class ViTAnalysis:
    """What [`analyze_vit`] found. Heads and layers are counted from 0.

    Attributes:
        model_name: class and source of the model.
        grid: its tokens.
        pictures: `(images, height, width, 3)` uint8, the images as they are passed to the model.
        class_names: names of the classes; empty of a model without a classifier.
        labels: `(images,)` true classes, if they were given.
        logits: `(images, classes)`, if the model has a classifier.
        leave_one_out: metric -> `(layers, heads, images)`, with single heads removed.
        keep_one: metric -> `(layers, heads, images)`, the other heads of the layer removed; empty if not requested.
        without_layer: metric -> `(layers, images)`, all heads of a layer removed.
        mean_maps: `(layers, heads, tokens, tokens)`, attention averaged over images.
        patch_entropy: `(layers, heads)`, entropy of each image's patch rows, averaged over images.
        partial: (layer, head) -> part of its attention -> metric -> `(images,)`.
        curves: rows of the table `curve`.
        example_maps: `(examples, layers, heads, tokens, tokens)`, the maps of the first images.
        class_maps: `(images, layers, heads, patches)`, what the class token looks at; with no class token, what the patches look at
            on average.
    """

    model_name: str
    grid: Grid
    pictures: np.ndarray
    class_names: tuple[str, ...]
    labels: torch.Tensor | None
    logits: torch.Tensor | None
    leave_one_out: dict[str, torch.Tensor]
    keep_one: dict[str, torch.Tensor]
    without_layer: dict[str, torch.Tensor]
    mean_maps: torch.Tensor
    patch_entropy: torch.Tensor
    partial: dict[tuple[int, int], dict[str, dict[str, torch.Tensor]]] = field(default_factory=dict)
    curves: list[dict] = field(default_factory=list)
    example_maps: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    class_maps: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __repr__(self) -> str:
        layers, heads = self.patch_entropy.shape
        return f"ViTAnalysis({self.model_name}, {layers} layers x {heads} heads, {len(self.pictures)} images)"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the model and the labels permit."""
        return tuple(self.leave_one_out)

    @cached_property
    def strength(self) -> AttentionStrength:
        """Hop profiles `(layers, heads, hops)` and derived values."""
        return attention_strength(self.mean_maps, self.grid)

    @cached_property
    def offset_maps(self) -> torch.Tensor:
        """`(layers, heads, 2 rows - 1, 2 cols - 1)`."""
        return offset_map(self.mean_maps, self.grid)

    def clusters(
        self, num_clusters: int | None = None, features: str | np.ndarray = "maps", seed: int = 0
    ) -> HeadClusters:
        """Group the heads by their attention patterns; for the arguments see [`~hf_attn.analysis.vit.patterns.cluster_heads`]."""
        return cluster_heads(self.mean_maps, self.grid, num_clusters, features, seed)

    def _head_table(self, values: Mapping[str, torch.Tensor]) -> "DataFrame":
        import pandas as pd

        layers, heads = self.patch_entropy.shape
        index = [(layer, head) for layer in range(layers) for head in range(heads)]
        columns = {name: tensor.flatten().tolist() for name, tensor in values.items()}
        return pd.DataFrame({"layer": [i for i, _ in index], "head": [j for _, j in index], **columns})

    def tables(self) -> dict[str, "DataFrame"]:
        """All results as pandas tables.

        - `importance`: mean over images of each metric, with single heads removed;
        - `keep_one`: the same with all other heads of its layer removed;
        - `layers`: the same without any head of a layer;
        - `images`: prediction, label and the head whose removal changes the image most;
        - `strength`: attention to the prefix tokens, mean hop and entropy of each head;
        - `hops`: ring profile of each head; `trend`: mean and quartiles over the heads of a layer;
        - `partial`: metrics without parts of a head's attention;
        - `curve`: accuracy (or agreement with the full model) against heads removed;
        - `clusters`: cluster and pattern of each head.
        """
        import pandas as pd

        def means(changes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: values.mean(-1) for name, values in changes.items()}

        strength = self.strength
        found = {
            "importance": self._head_table(means(self.leave_one_out)),
            "layers": pd.DataFrame(
                {
                    "layer": range(len(self.patch_entropy)),
                    **{name: values.tolist() for name, values in means(self.without_layer).items()},
                }
            ),
            "images": self._image_table(),
            "strength": self._head_table(
                {"to_cls": strength.to_cls, "mean_hop": strength.mean_hop, "patch_entropy": self.patch_entropy}
            ),
        }
        if self.keep_one:
            found["keep_one"] = self._head_table(means(self.keep_one))
        rings = {name: getattr(strength, name) for name in ("ring_mass", "ring_mean", "ring_pooled_mean")}
        found["hops"] = pd.concat(
            [
                self._head_table({"hop": torch.full_like(self.patch_entropy, hop, dtype=torch.long)}).assign(
                    **{name: values[..., hop].flatten().tolist() for name, values in rings.items()}
                )
                for hop in range(self.grid.num_hops)
            ],
            ignore_index=True,
        ).sort_values(["layer", "head", "hop"], ignore_index=True)
        quantities = found["strength"].drop(columns="head").groupby("layer")
        found["trend"] = pd.concat(
            [
                quantities.mean().add_suffix("_mean"),
                *(quantities.quantile(q).add_suffix(f"_q{round(100 * q)}") for q in (0.25, 0.5, 0.75)),
            ],
            axis=1,
        ).reset_index()
        if self.partial:
            found["partial"] = pd.DataFrame(
                [
                    {"layer": head[0], "head": head[1], "part": part}
                    | {name: values.mean().item() for name, values in changes.items()}
                    for head, parts in self.partial.items()
                    for part, changes in parts.items()
                ]
            )
        if self.curves:
            found["curve"] = pd.DataFrame(self.curves)
        if self.patch_entropy.numel() >= 3:
            clusters = self.clusters()
            found["clusters"] = self._head_table({"cluster": torch.from_numpy(clusters.labels)}).assign(
                pattern=[clusters.names[label] for label in clusters.labels]
            )
        return found

    @property
    def ranking_metric(self) -> str:
        """The metric by which heads are ranked: `jsd`, or `cls_l2` without a classifier."""
        return "jsd" if "jsd" in self.leave_one_out else "cls_l2"

    def _image_table(self) -> "DataFrame":
        import pandas as pd

        changes = self.leave_one_out[self.ranking_metric]
        heads = changes.shape[1]
        largest = changes.flatten(0, 1).argmax(0)
        table = pd.DataFrame({"image": range(len(self.pictures))})
        if self.logits is not None:
            probabilities = self.logits.softmax(-1)
            table["prediction"] = [self.class_names[index] for index in probabilities.argmax(-1)]
            table["probability"] = probabilities.amax(-1).tolist()
        if self.labels is not None:
            table["label"] = [self.class_names[index] for index in self.labels]
        return table.assign(
            most_important_layer=(largest // heads).tolist(), most_important_head=(largest % heads).tolist()
        )

    def save(self, folder: str | Path) -> Path:
        """Write every table as CSV and JSON into a folder that is empty or does not exist yet.

        Raises:
            OutputFolderError: if the folder is not empty.
        """
        folder = empty_folder(folder)
        for name, table in self.tables().items():
            table.to_csv(folder / f"{name}.csv", index=False)
            (folder / f"{name}.json").write_text(
                json.dumps(json.loads(table.to_json(orient="records")), indent=1), encoding="utf-8"
            )
        return folder

    def figures(self) -> dict[str, "Figure"]:
        """Static figures by name; needs matplotlib (the extra `analysis`)."""
        from .figures import all_figures

        return all_figures(self)

    def report(self, folder: str | Path) -> Path:
        """Write `report.html`, one page with linked views that needs no network, with the tables and figures beside it.

        Returns:
            The path of the page.

        Raises:
            OutputFolderError: if the folder is not empty.
        """
        from .report import write_page

        folder = self.save(folder)
        for name, figure in self.figures().items():
            figure.savefig(folder / f"{name}.png", dpi=100)
        return write_page(self, folder / "report.html")


def empty_folder(folder: str | Path) -> Path:
    """A folder that is made if it does not exist, and must be empty.

    Raises:
        OutputFolderError: if it is a file or not empty.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, not a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputFolderError(f"{folder} is not empty. Choose another folder, so that nothing is overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
