"""Pseudo-labels of the region proposal network: attention maps of a base model, denoised into three classes.

A cell of the image-token grid is foreground, background, or ignored if the attention is inconclusive. Both rules are
those of the official code (arXiv 2509.16944, section 3.2), which finds sinks by their attention in an early layer and
not, as printed, by the norm of their features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_attn.modeling.sd_rpn.modeling_sd_rpn import IGNORE_INDEX


FOREGROUND, BACKGROUND, IGNORED = 1, 0, IGNORE_INDEX


class PseudoLabels(NamedTuple):
    """Labels of grids.

    Attributes:
        labels: int64 `(batch, rows, columns)` of `FOREGROUND`, `BACKGROUND` and `IGNORED`.
        boxes: int64 `(batch, 4)`: first row, first column, last row and last column, both ends inclusive, of what was
            taken for the object; the whole grid where there is nothing. Meaningful for ignored grids too.
    """

    labels: torch.Tensor
    boxes: torch.Tensor


def pseudo_labels(
    grounding: torch.Tensor,
    sink: torch.Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    rule: str,
    sink_threshold: float,
) -> PseudoLabels:
    """Labels by the rule of a base model.

    Args:
        grounding, sink: `(batch, rows, columns)`, see [`llava_pseudo_labels`].
        image_sizes: width and height of each image, which only Qwen2.5-VL's rule depends on.
        rule: `llava` or `qwen`.
        sink_threshold: attention from which a cell is a sink.

    Raises:
        ValueError: if there is no such rule, or the maps do not fit it.
    """
    if rule == "llava":
        return llava_pseudo_labels(grounding, sink, sink_threshold=sink_threshold)
    if rule == "qwen":
        return qwen_pseudo_labels(grounding, sink, image_sizes, sink_threshold=sink_threshold)
    raise ValueError(f"rule must be 'llava' or 'qwen', got {rule!r}.")


def llava_pseudo_labels(
    grounding: torch.Tensor,
    sink: torch.Tensor,
    *,
    sink_threshold: float = 1e-3,
    foreground_ratio: float = 0.2,
    background_ratio: float = 0.1,
    max_box_ratio: float = 0.5,
) -> PseudoLabels:
    """Labels by the rule for LLaVA.

    With a' the grounding attention without sinks and m its maximum: foreground is a' > 0.2 m; background is a' < 0.1 m
    outside the box around the foreground, and so are sinks there; everything is ignored if the box takes half of the
    grid.

    Args:
        grounding: `(batch, rows, columns)`, attention of the answer to the image in the heads that attend to the object.
        sink: of the same shape, attention that marks cells which collect attention without a meaning.
        sink_threshold: attention from which a cell is a sink.
        foreground_ratio, background_ratio: thresholds as fractions of the maximum.
        max_box_ratio: share of the grid from which the box is ignored.

    Raises:
        ValueError: if the maps are not batches of grids of equal shape, or contain negative or non-finite values.
    """
    grounding, sink = _checked_maps(grounding, sink)
    cleaned = torch.where(sink < sink_threshold, grounding, 0)
    peak = cleaned.amax((1, 2), keepdim=True)
    foreground = cleaned > foreground_ratio * peak
    boxes = _extents(foreground)
    background = ~_inside(boxes, grounding.shape) & (cleaned < background_ratio * peak)
    return _combine(foreground, background, boxes, _areas(boxes) < max_box_ratio * grounding[0].numel())


def qwen_pseudo_labels(
    grounding: torch.Tensor,
    sink: torch.Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    sink_threshold: float = 1e-2,
    foreground_ratio: float = 0.2,
    background_ratio: float = 0.1,
    max_box_ratio: float = 0.5,
    min_peak: float = 5e-3,
) -> PseudoLabels:
    """Labels by the rule for Qwen2.5-VL, whose images are padded to a square.

    As for LLaVA, but: padding is background and never foreground; the box is a cell wider on each side; everything is
    ignored as well if the maximum is below `min_peak`.

    Args:
        grounding, sink: `(batch, g, g)`, see [`llava_pseudo_labels`].
        image_sizes: width and height of each image before it was padded.
        sink_threshold, foreground_ratio, background_ratio, max_box_ratio: see [`llava_pseudo_labels`].
        min_peak: minimum of the largest attention without sinks and padding; below it the map is ignored.

    Raises:
        ValueError: as [`llava_pseudo_labels`], or if the grids are not square or the sizes do not fit the batch.
    """
    grounding, sink = _checked_maps(grounding, sink)
    batch, rows, columns = grounding.shape
    if rows != columns:
        raise ValueError(f"Images are padded to a square, but the grids are {rows}x{columns}.")
    if len(image_sizes) != batch:
        raise ValueError(f"There are {batch} maps, but {len(image_sizes)} image sizes.")
    padding = torch.stack([padded_cells(width, height, rows) for width, height in image_sizes]).to(grounding.device)

    without_sinks = torch.where(sink < sink_threshold, grounding, 0)
    cleaned = torch.where(padding, 0, without_sinks)
    peak = cleaned.amax((1, 2), keepdim=True)
    foreground = cleaned > foreground_ratio * peak
    # The official code blurs with a 3x3 kernel and takes what is above zero; the kernel is positive everywhere.
    boxes = _extents(foreground) + torch.tensor([-1, -1, 1, 1], device=grounding.device)
    boxes = boxes.clamp(0, rows - 1)
    background = ~_inside(boxes, grounding.shape) & (without_sinks < background_ratio * peak) | padding
    usable = (_areas(boxes) < max_box_ratio * rows * columns) & (peak.flatten() >= min_peak)
    return _combine(foreground, background, boxes, usable)


def padded_cells(width: int, height: int, grid_size: int) -> torch.Tensor:
    """Which cells lie wholly in the padding of an image that was centred in a square.

    As in the official code, both sides have `(grid_size - n) // 2` of them if the image takes n cells, so that of an odd
    number of spare cells one counts as image.

    Args:
        width, height: size of the image.
        grid_size: cells in a row of the square.

    Returns:
        bool `(grid_size, grid_size)`.

    Raises:
        ValueError: if a number is not positive.
    """
    if min(width, height, grid_size) < 1:
        raise ValueError(f"width, height and grid_size must be positive, got {width}, {height} and {grid_size}.")
    inside = torch.zeros(grid_size, grid_size, dtype=torch.bool)
    row_margin, column_margin = (
        (grid_size - max(int(side / max(width, height) * grid_size), 1)) // 2 for side in (height, width)
    )
    inside[row_margin : grid_size - row_margin, column_margin : grid_size - column_margin] = True
    return ~inside


def _checked_maps(grounding: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps in float64, in which the official code compares with its thresholds."""
    if grounding.ndim != 3 or grounding.shape != sink.shape or grounding[0].numel() == 0:
        raise ValueError(
            "Pseudo-labels need two maps with the same shape (batch, rows, columns), got "
            f"{tuple(grounding.shape)} and {tuple(sink.shape)}."
        )
    for name, values in (("grounding", grounding), ("sink", sink)):
        if not (torch.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"The {name} map contains negative or non-finite values, so it is not an attention map.")
    return grounding.double(), sink.double()


def _extents(mask: torch.Tensor) -> torch.Tensor:
    """First and last rows and columns of the true cells `(batch, 4)`, those of the grid if there are none."""
    mask = mask | ~mask.any((1, 2))[:, None, None]
    firsts, lasts = [], []
    for occupied in (mask.any(2), mask.any(1)):
        firsts.append(occupied.int().argmax(1))
        lasts.append(occupied.shape[1] - 1 - occupied.flip(1).int().argmax(1))
    return torch.stack([*firsts, *lasts], 1)


def _inside(boxes: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = torch.arange(shape[1], device=boxes.device)[:, None]
    columns = torch.arange(shape[2], device=boxes.device)
    top, left, bottom, right = boxes[..., None, None].unbind(1)
    return (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)


def _combine(
    foreground: torch.Tensor, background: torch.Tensor, boxes: torch.Tensor, usable: torch.Tensor
) -> PseudoLabels:
    labels = torch.full_like(foreground, IGNORED, dtype=torch.int64)
    labels[background] = BACKGROUND
    labels[foreground] = FOREGROUND
    labels[~usable] = IGNORED
    return PseudoLabels(labels, boxes)
