"""One HTML page with linked views of an analysis; it contains its data and images, and needs no network."""

import base64
import html
import io
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..hops import ring_mean
from ..patterns import FEATURES


if TYPE_CHECKING:
    from ..results import ViTAnalysis


#: number of images on a page
_SHOWN = 60
#: their longest side in pixels
_IMAGE_SIDE = 160


def write_page(analysis: "ViTAnalysis", path: Path) -> Path:
    """Write the page of an analysis."""
    parts = {
        name: (resources.files(__package__) / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")
    }
    # "<" could end the script element, or begin another.
    data = json.dumps(_data(analysis), allow_nan=False).replace("<", "\\u003c")
    page = Template(parts["html"]).substitute(
        title=html.escape(analysis.model_name), style=parts["css"], data=data, script=parts["js"]
    )
    path.write_text(page, encoding="utf-8")
    return path


def _data(analysis: "ViTAnalysis") -> dict[str, Any]:
    grid, strength = analysis.grid, analysis.strength
    layers, heads = analysis.patch_entropy.shape
    shown = min(len(analysis.pictures), _SHOWN)
    ranking = analysis.leave_one_out[analysis.ranking_metric].mean(-1)
    importance = {"leave_one_out": analysis.leave_one_out, "keep_one": analysis.keep_one}
    per_patch = ring_mean(analysis.mean_maps, grid).flatten(0, 1)
    bands = torch.stack([per_patch.nanquantile(q, dim=1) for q in (0.25, 0.75)], 1)
    clusters, best = _clusters(analysis)
    return {
        "model": analysis.model_name,
        "layers": layers,
        "heads": heads,
        "rows": grid.rows,
        "cols": grid.cols,
        "patches": grid.num_patches,
        "prefix": grid.num_prefix_tokens,
        "tokens": grid.num_tokens,
        "start": list(divmod(int(ranking.argmax()), heads)),
        "metrics": list(analysis.metrics),
        "ranking": analysis.ranking_metric,
        "num_images": len(analysis.pictures),
        "images": [_encoded(image) for image in analysis.pictures[:shown]],
        "facts": _facts(analysis, shown),
        "changes": {name: _floats(values[..., :shown]) for name, values in analysis.leave_one_out.items()},
        "importance": {
            kind: {name: values.mean(-1).flatten().tolist() for name, values in changes.items()}
            for kind, changes in importance.items()
            if changes
        },
        "partial": {
            f"{layer}-{head}": {
                part: {name: values.mean().item() for name, values in changes.items()}
                for part, changes in parts.items()
            }
            for (layer, head), parts in analysis.partial.items()
        },
        "curves": [{**row, "mean": float(row["mean"]), "std": float(row["std"])} for row in analysis.curves],
        "ring_mean": strength.ring_mean.flatten(0, 1).tolist(),
        "ring_bands": bands.tolist(),
        "strength": {
            name: values.flatten().tolist()
            for name, values in (
                ("mean_hop", strength.mean_hop),
                ("to_cls", strength.to_cls),
                ("patch_entropy", analysis.patch_entropy),
            )
        },
        "clusters": clusters,
        "k": best,
        "mean_maps": _maps(grid.patch_block(analysis.mean_maps)),
        "offset_maps": _floats(analysis.offset_maps),
        "class_maps": _maps(analysis.class_maps[:shown, ..., None, :]),
        "examples": min(len(analysis.example_maps), shown),
        "example_maps": _maps(grid.patch_block(analysis.example_maps[:shown])),
    }


def _clusters(analysis: "ViTAnalysis") -> tuple[dict[str, Any], int]:
    heads = analysis.patch_entropy.numel()
    if heads < 3:
        return {}, 0
    found: dict[str, Any] = {}
    for kind in FEATURES:
        ways = {k: analysis.clusters(k, kind) for k in range(2, min(10, heads - 1) + 1)}
        some = next(iter(ways.values()))
        found[kind] = {
            "positions": some.positions.tolist(),
            "silhouette": some.silhouette,
            "k": {k: {"labels": way.labels.tolist(), "names": way.names} for k, way in ways.items()},
        }
    silhouette = found[FEATURES[0]]["silhouette"]
    return found, max(silhouette, key=silhouette.get)


def _facts(analysis: "ViTAnalysis", shown: int) -> list[str]:
    facts = [""] * shown
    if analysis.logits is not None:
        probabilities = analysis.logits[:shown].softmax(-1)
        facts = [
            f"{analysis.class_names[index]} ({probability:.0%})"
            for index, probability in zip(
                probabilities.argmax(-1).tolist(), probabilities.amax(-1).tolist(), strict=True
            )
        ]
    if analysis.labels is not None:
        facts = [
            f"{fact}, label {analysis.class_names[label]}"
            for fact, label in zip(facts, analysis.labels[:shown], strict=True)
        ]
    return facts


def _encoded(pixels: np.ndarray) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) <= 64 else "JPEG", quality=85)
    return f"data:image/{'png' if max(image.size) <= 64 else 'jpeg'};base64,{_text(buffer.getvalue())}"


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _floats(values: torch.Tensor) -> str:
    return _text(values.contiguous().float().numpy().astype("<f4").tobytes())


def _maps(values: torch.Tensor) -> dict[str, str]:
    """Maps `(..., rows, cols)` as bytes, each relative to its own maximum."""
    scale = values.amax((-2, -1), keepdim=True)
    relative = (values / scale.clamp_min(1e-20) * 255).round().byte()
    return {"values": _text(relative.contiguous().numpy().tobytes()), "scale": _floats(scale)}
