"""Predictions of a vision transformer without single heads, with a single head per layer, and with more and more heads removed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .gating import partial_mask, without_attention, without_heads
from .hops import Grid
from .layout import Outcome, ViTLayout
from .metrics import prediction_change, representation_change
from .restart import BatchRestart


def changes_of(full: Outcome, pruned: Outcome, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """All metrics, image by image, that the model and the labels permit; see [`prediction_change`]."""
    changes = representation_change(full.representation, pruned.representation)
    if full.logits is not None:
        changes = prediction_change(full.logits, pruned.logits, labels) | changes
    return changes


@torch.no_grad()
def head_outcomes(layout: ViTLayout, pixel_values: torch.Tensor) -> tuple[Outcome, Outcome]:
    """Predictions of the full model and of the model without each head.

    Returns:
        The full outcome, and one whose tensors are `(layers, heads, images, ...)`.
    """
    batch = BatchRestart(layout, pixel_values, layout.grid_of(pixel_values))
    heads = range(layout.num_heads)
    found = [[layer.without([head]) for head in heads] for layer in batch.layers()]

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([torch.stack([getattr(outcome, name) for outcome in row]) for row in found])

    logits = None if batch.full.logits is None else stacked("logits")
    return batch.full, Outcome(logits=logits, representation=stacked("representation"))


@dataclass
class PruningSums:
    """Metrics of a model without some of its heads, batch by batch.

    Attributes:
        layout: the model, in eval mode.
        grid: its tokens.
        keep_one: whether to run with only one head of a layer as well.
        on_run: called after each run with the number of layers that it ran, for progress.
        leave_one_out: metric -> `(layers, heads, images)`.
        keep: metric -> `(layers, heads, images)`, with one head left in a layer.
        layer: metric -> `(layers, images)`, without all heads of a layer.
        logits: `(images, classes)` of the full model, if it has a classifier.
    """

    layout: ViTLayout
    grid: Grid
    keep_one: bool = True
    on_run: Callable[[int], object] = lambda layers: None
    _leave: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _keep: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _layer: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _logits: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add a batch of images and, if there are, their labels."""
        batch = BatchRestart(self.layout, pixel_values, self.grid)
        leave, keep, whole = [], [], []

        def changes(index: int, outcome: Outcome) -> dict[str, torch.Tensor]:
            self.on_run(self.layout.num_layers - index)
            return {name: values.cpu() for name, values in changes_of(batch.full, outcome, labels).items()}

        heads = range(self.layout.num_heads)
        for layer in batch.layers():
            leave.append(_stack([changes(layer.index, layer.without([head])) for head in heads]))
            if self.keep_one:
                keep.append(_stack([changes(layer.index, layer.keeping([head])) for head in heads]))
            whole.append(changes(layer.index, layer.keeping([])))
        self._leave.append(_stack(leave))
        self._layer.append(_stack(whole))
        if keep:
            self._keep.append(_stack(keep))
        if batch.full.logits is not None:
            self._logits.append(batch.full.logits.float().cpu())

    @property
    def leave_one_out(self) -> dict[str, torch.Tensor]:
        return _joined(self._leave)

    @property
    def keep(self) -> dict[str, torch.Tensor]:
        return _joined(self._keep)

    @property
    def layer(self) -> dict[str, torch.Tensor]:
        return _joined(self._layer)

    @property
    def logits(self) -> torch.Tensor | None:
        return torch.cat(self._logits) if self._logits else None


def _stack(changes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([change[name] for change in changes]) for name in changes[0]}


def _joined(changes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([change[name] for change in changes], -1) for name in changes[0]} if changes else {}


@torch.no_grad()
def partial_changes(
    layout: ViTLayout,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    head: tuple[int, int],
    kinds: Sequence[str],
    grid: Grid,
) -> dict[str, dict[str, torch.Tensor]]:
    """Metrics, image by image, without parts of one head's attention.

    Args:
        layout: the model, in eval mode.
        batches: pixel values with their labels, or `None`.
        head: layer and head.
        kinds: the parts; see [`~hf_attn.analysis.vit.gating.partial_mask`].
        grid: tokens of the images.

    Returns:
        Kind -> metric -> `(images,)`.
    """
    has_class_token = grid.num_prefix_tokens > 0
    found: dict[str, list] = {kind: [] for kind in kinds}
    for pixel_values, labels in batches:
        full = layout.run(pixel_values, has_class_token)
        for kind in kinds:
            with without_attention(layout, *head, partial_mask(kind, grid, pixel_values.device)):
                pruned = layout.run(pixel_values, has_class_token)
            found[kind].append({name: values.cpu() for name, values in changes_of(full, pruned, labels).items()})
    return {kind: _joined(changes) for kind, changes in found.items()}


def removal_steps(num_heads: int, points: int) -> list[int]:
    """How many heads are removed at each of at most `points` points of a curve, from none to all."""
    points = min(points, num_heads + 1)
    return sorted({round(step * num_heads / (points - 1)) for step in range(points)})


@torch.no_grad()
def cumulative_removal(
    layout: ViTLayout,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    order: Sequence[tuple[int, int]],
    steps: Sequence[int],
    grid: Grid,
) -> Iterator[torch.Tensor]:
    """Predicted classes `(images,)` with the first n heads of an order removed, for each n of `steps`."""
    for count in steps:
        removed: dict[int, list[int]] = {}
        for layer, head in order[:count]:
            removed.setdefault(layer, []).append(head)
        with without_heads(layout, removed):
            predictions = [
                layout.run(pixel_values, grid.num_prefix_tokens > 0).logits.argmax(-1).cpu()
                for pixel_values, _ in batches
            ]
        yield torch.cat(predictions)
