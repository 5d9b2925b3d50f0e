"""The whole analysis of a vision transformer's attention: importance, reach and patterns of its heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .hops import Grid
from .layout import ViTLayout
from .maps import MeanMaps, observe_attention
from .metrics import check_labels
from .pruning import PruningSums, cumulative_removal, partial_changes, removal_steps
from .results import ViTAnalysis


if TYPE_CHECKING:
    from PIL.Image import Image


#: memory for the maps of example images that a report shows patch by patch, in numbers
_EXAMPLE_NUMBERS = 6_000_000


def analyze_vit(
    model: nn.Module,
    images: "torch.Tensor | Sequence[Image]",
    labels: Sequence[int | str] | torch.Tensor | None = None,
    *,
    processor: Any = None,
    batch_size: int = 4,
    keep_one: bool = True,
    partial_heads: int = 3,
    curve_points: int = 9,
    random_orders: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> ViTAnalysis:
    """Measure which heads of a vision transformer matter, how far they look, and what patterns they have.

    Every head is removed in turn: its output is zero before the output projection. The runs begin at the layer of the head, whose
    attention is computed once, so they take less than half the time of full ones. Maps are averaged layer by layer; those of
    all images are never held together.

    Args:
        model: ViT, DeiT, DINOv2, BEiT, the vision tower of CLIP or SigLIP, SigmaReparamViT, or a vision transformer of timm. It stays
            unchanged; it runs in eval mode on its device.
        images: pixel values `(images, channels, height, width)` as the model takes them, or images, which need `processor`.
            A few hundred give reliable means.
        labels: true classes, as indices or names; adds the metrics that compare with them.
        processor: image processor of the model, or a transform of timm, which converts images to pixel values.
        batch_size: images of a run; memory grows with it.
        keep_one: also run with only one head of a layer left. Twice the time.
        partial_heads: so many of the most important heads are taken apart: parts of their attention are removed.
        curve_points: points of the curves of accuracy against heads removed; 0 for no curves.
        random_orders: random orders that the curves are compared with.
        seed: of the random orders.
        progress: show a bar with the time that is left.

    Raises:
        UnknownLayoutError: for a model that is not supported; the message lists the supported ones.
        ValueError: for images of the wrong size, fewer than two images, or labels that the model does not have.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("partial_heads", partial_heads, 0),
        ("curve_points", curve_points, 0),
        ("random_orders", random_orders, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if curve_points == 1:
        raise ValueError("curve_points must be 0, or at least 2 (no head removed, and all heads removed).")
    layout = ViTLayout.of(model)
    pixel_values = _pixel_values(images, processor)
    if len(pixel_values) < 2:
        raise ValueError(f"Importance is a mean over images: pass at least 2, got {len(pixel_values)}.")
    if not bool(pixel_values.isfinite().all()):
        raise ValueError("The pixel values contain NaN or infinity.")
    parameter = next(model.parameters())
    with _eval_mode(model), torch.no_grad():
        grid = layout.grid_of(pixel_values[:1].to(parameter))
        classes = layout.run(pixel_values[:1].to(parameter), grid.num_prefix_tokens > 0).logits
        num_classes = 0 if classes is None else classes.shape[-1]
        class_names = _class_names(model, num_classes)
        label_indices = _label_indices(labels, class_names, len(pixel_values))
        batches = [
            (pixels.to(parameter), None if label_indices is None else label_indices[start : start + len(pixels)])
            for start, pixels in zip(
                range(0, len(pixel_values), batch_size), pixel_values.split(batch_size), strict=True
            )
        ]
        kinds = (
            *(["cls_to_patch", "patch_to_cls", "cls_to_cls"] if grid.num_prefix_tokens else []),
            "patch_to_patch",
            *(f"ring_{hop}" for hop in range(min(grid.num_hops, 5))),
            "head",
        )
        partial_heads = min(partial_heads, layout.num_layers * layout.num_heads)
        steps = (
            removal_steps(layout.num_layers * layout.num_heads, curve_points) if curve_points and num_classes else []
        )
        # In layers of a batch, which take about the same time each.
        layers = layout.num_layers
        restarts = (layout.num_heads * (1 + keep_one) + 1) * layers * (layers + 1) // 2
        whole_runs = 3 + partial_heads * (1 + len(kinds)) + len(steps) * (2 + random_orders)
        with _bar(len(batches) * (restarts + whole_runs * layers), progress) as bar:
            sums = PruningSums(layout, grid, keep_one, bar.update)
            mean_maps = MeanMaps(layout, grid)
            class_maps = []
            for pixels, batch_labels in batches:
                sums.add(pixels, batch_labels)
                mean_maps.add(pixels)
                class_maps.append(_class_maps(layout, pixels, grid))
                bar.update(3 * layers)
            importance = sums.leave_one_out["jsd" if num_classes else "cls_l2"].mean(-1)
            order = [divmod(index, layout.num_heads) for index in importance.flatten().argsort().tolist()]
            partial = {}
            for head in order[::-1][:partial_heads]:
                partial[head] = partial_changes(layout, batches, head, kinds, grid)
                bar.update(len(batches) * (1 + len(kinds)) * layers)
            curves = _curves(layout, batches, order, steps, grid, label_indices, sums.logits, random_orders, seed, bar)
        examples = max(1, _EXAMPLE_NUMBERS // (layers * layout.num_heads * grid.num_tokens**2))
        example_maps = _example_maps(layout, pixel_values[: min(examples, 8)].to(parameter))
    return ViTAnalysis(
        model_name=_name_of(model),
        grid=grid,
        pictures=_pictures(pixel_values),
        class_names=class_names,
        labels=label_indices,
        logits=sums.logits,
        leave_one_out=sums.leave_one_out,
        keep_one=sums.keep,
        without_layer=sums.layer,
        mean_maps=mean_maps.maps,
        patch_entropy=mean_maps.patch_entropy,
        partial=partial,
        curves=curves,
        example_maps=example_maps,
        class_maps=torch.cat(class_maps),
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _bar(total: int, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not progress, desc="Analysing", unit="layer", smoothing=0.05)


def _pixel_values(images, processor) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        if not images.is_floating_point():
            raise ValueError(
                f"Pixel values must be floating-point numbers, as returned by the image processor; got {images.dtype}."
            )
        return images
    images = list(images)
    if not images:
        raise ValueError("There are no images.")
    if processor is None:
        raise ValueError(
            "Images need `processor`, the image processor of the model. Alternatively, pass pixel values."
        )
    images = [image.convert("RGB") for image in images]
    if hasattr(processor, "image_processor"):
        processor = processor.image_processor
    if hasattr(processor, "preprocess"):
        return processor(images, return_tensors="pt")["pixel_values"]
    return torch.stack([processor(image) for image in images])


def _class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names.get(index, index)) for index in range(num_classes))


def _label_indices(labels, class_names: tuple[str, ...], images: int) -> torch.Tensor | None:
    if labels is None:
        return None
    if not class_names:
        raise ValueError("Labels were passed, but the model has no classifier.")
    if not isinstance(labels, torch.Tensor):
        labels = list(labels)
        unknown = [label for label in labels if isinstance(label, str) and label not in class_names]
        if unknown:
            known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
            raise ValueError(f"Label {unknown[0]!r} is not a class of the model. Its classes: {known}.")
        labels = torch.tensor([class_names.index(label) if isinstance(label, str) else label for label in labels])
    check_labels(labels, images, len(class_names))
    return labels.cpu()


def _name_of(model: nn.Module) -> str:
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "default_cfg", {}).get(
        "architecture", ""
    )
    return f"{type(model).__name__} ({source})" if source else type(model).__name__


def _pictures(pixel_values: torch.Tensor) -> np.ndarray:
    """Pixel values as 8-bit images, each stretched to the whole range."""
    low, high = (getattr(pixel_values.flatten(1), name)(1)[:, None, None, None] for name in ("amin", "amax"))
    stretched = (pixel_values - low) / (high - low).clamp_min(1e-6)
    if stretched.shape[1] != 3:
        stretched = stretched.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (stretched * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _class_maps(layout: ViTLayout, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
    prefix = grid.num_prefix_tokens
    found = []

    def observe(layer: int, weights: torch.Tensor) -> None:
        to_patches = weights[..., prefix:]
        found.append((to_patches[:, :, 0] if prefix else to_patches.mean(2)).float().cpu())

    observe_attention(layout, pixel_values, observe)
    return torch.stack(found, 1)


def _example_maps(layout: ViTLayout, pixel_values: torch.Tensor) -> torch.Tensor:
    found = []
    observe_attention(layout, pixel_values, lambda layer, weights: found.append(weights.float().cpu()))
    return torch.stack(found, 1)


def _curves(layout, batches, order, steps, grid, labels, logits, random_orders, seed, bar) -> list[dict]:
    """Rows of the table `curve`: accuracy against heads removed in order of importance, backwards, and at random."""
    if not steps:
        return []
    wanted = logits.argmax(-1) if labels is None else labels
    shuffles = np.random.default_rng(seed)
    orders = {"least important first": [order], "most important first": [order[::-1]]}
    orders["random"] = [[order[index] for index in shuffles.permutation(len(order))] for _ in range(random_orders)]
    rows = []
    for name, ways in orders.items():
        scores = []
        for way in ways:
            found = cumulative_removal(layout, batches, way, steps, grid)
            scores.append([(predicted == wanted).double().mean().item() for predicted in found])
            bar.update(len(batches) * len(steps) * layout.num_layers)
        for step, values in zip(steps, np.array(scores).T, strict=True):
            score = "agreement" if labels is None else "accuracy"
            rows.append({"order": name, "removed": step, "score": score, "mean": values.mean(), "std": values.std()})
    return rows
