"""Boxes, grids and fixations of a scene. Boxes are `(objects, 4)`, pixels, `x1, y1, x2, y2`."""

from collections.abc import Sequence

import torch


#: boxes of two objects may share at most this much (intersection over union)
MAX_OVERLAP = 0.5


def check_boxes(boxes: torch.Tensor | Sequence, height: int, width: int) -> torch.Tensor:
    """Check the boxes of an image and round them to whole pixels.

    Raises:
        ValueError: if there is no box, or a box is invalid, empty, outside of the image or the same object as another one; the
            message says which.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or not len(boxes):
        raise ValueError(f"boxes must have the shape (objects, 4) with at least one object, got {tuple(boxes.shape)}.")
    if not boxes.isfinite().all():
        raise ValueError(f"Box {_first(~boxes.isfinite().all(1))} has coordinates that are not finite.")
    rounded = boxes.round().long()
    empty = (rounded[:, 2:] <= rounded[:, :2]).any(1)
    if empty.any():
        index = _first(empty)
        hint = " Boxes must be in pixels, not in fractions of the image size." if boxes.max() <= 1 else ""
        raise ValueError(f"Box {index}, {boxes[index].tolist()}, is empty; boxes must be x1, y1, x2, y2.{hint}")
    outside = (rounded < 0).any(1) | (rounded[:, 2] > width) | (rounded[:, 3] > height)
    if outside.any():
        index = _first(outside)
        raise ValueError(
            f"Box {index}, {boxes[index].tolist()}, is not inside the image of {width} x {height} pixels."
        )
    overlap = box_iou(rounded, rounded).triu(diagonal=1)
    if overlap.max() > MAX_OVERLAP:
        first, second = divmod(overlap.argmax().item(), len(boxes))
        raise ValueError(
            f"Boxes {first} and {second} overlap by {overlap.max().item():.0%} and seem to be one object; pass one "
            "box per object."
        )
    return rounded


def _first(wrong: torch.Tensor) -> int:
    return wrong.nonzero()[0, 0].item()


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each pair, `(boxes, others)`."""
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (opposite - corner).clamp(min=0).prod(-1)
    areas, other_areas = ((some[:, 2:] - some[:, :2]).prod(-1) for some in (boxes, others))
    return intersection / (areas[:, None] + other_areas - intersection)


def box_centres(boxes: torch.Tensor) -> torch.Tensor:
    """Centres `(objects, 2)`, x and y."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def reading_order(boxes: torch.Tensor, row_height: int) -> torch.Tensor:
    """Order of boxes row by row: by top edge, in steps of `row_height` pixels, then by left edge."""
    keys = zip((boxes[:, 1] // row_height).tolist(), boxes[:, 0].tolist(), range(len(boxes)), strict=True)
    return torch.tensor([index for *_, index in sorted(keys)])


def grid_positions(boxes: torch.Tensor, grid: tuple[int, int] | None = None, row_height: int = 10) -> torch.Tensor:
    """Row and column of each object.

    Args:
        boxes: the objects, in any order.
        grid: rows and columns of a full grid, whose objects are counted in reading order. If not given, rows are boxes whose
            centres are at about one height, and columns those at about one distance from the left; an irregular row is
            numbered from left to right where two of its objects would share a column.
        row_height: pixels by which the top edges of a row of a full grid may differ, see [`reading_order`].

    Returns:
        `(objects, 2)`.

    Raises:
        ValueError: if there are more or fewer objects than places in the grid.
    """
    if grid is not None:
        rows, columns = grid
        if len(boxes) != rows * columns:
            raise ValueError(
                f"There are {len(boxes)} boxes, but {rows * columns} cells in the grid of {rows} x {columns}. Pass "
                "one box per cell, or leave the grid out."
            )
        places = torch.empty(len(boxes), dtype=torch.long)
        places[reading_order(boxes, row_height)] = torch.arange(len(boxes))
        return torch.stack([places // columns, places % columns], dim=-1)
    centres, sizes = box_centres(boxes), (boxes[:, 2:] - boxes[:, :2]).double()
    rows = _ranks(centres[:, 1], sizes[:, 1].median() / 2)
    columns = _ranks(centres[:, 0], sizes[:, 0].median() / 2)
    for row in rows.unique():
        members = (rows == row).nonzero()[:, 0]
        if len(columns[members].unique()) < len(members):
            columns[members] = centres[members, 0].argsort().argsort()
    return torch.stack([rows, columns], dim=-1)


def _ranks(values: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Numbers groups of values from the smallest on; a group ends where the next value is more than `gap` away."""
    order = values.argsort()
    steps = values[order].diff() > gap
    ranks = torch.empty(len(values), dtype=torch.long)
    ranks[order] = torch.nn.functional.pad(steps.long().cumsum(0), (1, 0))
    return ranks


def objects_at(fixations: torch.Tensor | Sequence, boxes: torch.Tensor) -> torch.Tensor:
    """The object of each fixation `(fixations, 2)`: whose box holds it, else whose centre is nearest; of several, the nearest.

    Raises:
        ValueError: if a fixation is not a pair of numbers.
    """
    fixations = torch.as_tensor(fixations, dtype=torch.float64).reshape(-1, 2)
    if not fixations.isfinite().all():
        raise ValueError(f"Fixation {_first(~fixations.isfinite().all(1))} has coordinates that are not finite.")
    points = fixations[:, None]
    inside = ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(-1)
    distances = (points - box_centres(boxes)).square().sum(-1)
    if not len(distances):
        return torch.empty(0, dtype=torch.long)
    # Boxes that contain the point come first.
    return torch.where(inside, distances, distances + distances.max() + 1).argmin(dim=1)


def object_of_box(box: torch.Tensor | Sequence, boxes: torch.Tensor) -> int:
    """The object whose box shares most with another box, such as that of a target.

    Raises:
        ValueError: if none shares anything with it.
    """
    overlap = box_iou(torch.as_tensor(box, dtype=torch.float64)[None], boxes.double())[0]
    if overlap.max() <= 0:
        raise ValueError(f"There is no object at the box {torch.as_tensor(box).tolist()}.")
    return overlap.argmax().item()


def grid_boxes(rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    """Boxes of a grid that covers an image, row by row."""
    ys = torch.linspace(0, height, rows + 1).round().long()
    xs = torch.linspace(0, width, columns + 1).round().long()
    boxes = [[xs[column], ys[row], xs[column + 1], ys[row + 1]] for row in range(rows) for column in range(columns)]
    return torch.tensor(boxes)
