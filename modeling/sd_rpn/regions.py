"""From RoI maps to regions of the original image.

LLaVA (a grid of square cells over the image padded to a square) uses connected regions: without a region there is no crop, one
region is cropped as it is, and of several the extent is cropped and only the tokens inside them are kept. Qwen2.5-VL (a grid over the image itself)
always takes the extent. Boxes are `(x0, y0, x1, y1)` with ends exclusive.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


Box = tuple[int, int, int, int]

#: a region of fewer cells is widened to at least 3x3; a single cell is noise
MIN_AREA = 4
#: regions with a larger share of the cells are not cropped: 225 of 24x24
MAX_AREA_FRACTION = 225 / 576
#: from this number of image tokens on, Qwen2.5-VL's maps have artefacts at their upper left border
BORDER_ARTEFACTS_ABOVE = 768
#: above this number of image tokens, the second pass of Qwen2.5-VL keeps only those that the question attends to
UNASKED_LEFT_OUT_ABOVE = 1024
#: smallest probability, for at least one token of the question, of an image token that is kept
MIN_ASKED = 0.01


@dataclass(frozen=True)
class Region:
    """A part of an image that is encoded again.

    Attributes:
        box: the part, in pixels of the original image.
        grid_box: the same in cells of the RoI map.
        binary: the cells of `grid_box` above the threshold, `(rows, columns)`, if only tokens inside them are kept.
    """

    box: Box
    grid_box: Box
    binary: torch.Tensor | None = None

    def kept_tokens(self, grid: tuple[int, int]) -> torch.Tensor:
        """Which tokens of the encoded part are kept, `(rows * columns,)`, if it has a grid of so many rows and columns."""
        if self.binary is None:
            return torch.ones(grid[0] * grid[1], dtype=torch.bool)
        resized = F.interpolate(self.binary.float()[None, None], size=grid, mode="bilinear", align_corners=False)
        kept = resized.flatten() > 0.5
        return kept if kept.any() else torch.ones_like(kept)


def blur(roi_map: torch.Tensor) -> torch.Tensor:
    """3x3 Gaussian of a map `(rows, columns)` with sigma 1, the border reflected."""
    kernel = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], device=roi_map.device) ** 2)
    kernel = (kernel / kernel.sum()).to(roi_map.dtype)
    blurred = roi_map[None, None]
    for shape, padding in (((1, 1, 3, 1), (0, 0, 1, 1)), ((1, 1, 1, 3), (1, 1, 0, 0))):
        # Nothing can be reflected into a single row or column, and its blur along that side is itself.
        if blurred.shape[shape.index(3)] > 1:
            blurred = F.conv2d(F.pad(blurred, padding, mode="reflect"), kernel.view(shape))
    return blurred[0, 0]


def above_threshold(blurred: torch.Tensor, threshold: float) -> torch.Tensor:
    """Cells above a threshold; a negative one is a fraction of the map's maximum."""
    return blurred > (threshold if threshold >= 0 else -threshold * blurred.max())


def extent(binary: torch.Tensor) -> Box | None:
    """Smallest box around the true cells; none if there are none."""
    rows, columns = binary.any(dim=1).nonzero()[:, 0], binary.any(dim=0).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def connected_components(binary: torch.Tensor) -> list[torch.Tensor]:
    """Masks of the components of a binary map; the eight cells around a cell are its neighbours."""
    cells = torch.arange(1, binary.numel() + 1, dtype=torch.float32, device=binary.device).view(binary.shape)
    # Every cell takes the largest number among its neighbours until nothing changes.
    labels = cells.flip(0, 1) * binary
    while True:
        spread = F.max_pool2d(labels[None, None], 3, stride=1, padding=1)[0, 0] * binary
        if torch.equal(spread, labels):
            break
        labels = spread
    return [labels == label for label in labels[binary].unique().flip(0)]


def region_boxes(binary: torch.Tensor, min_area: int = MIN_AREA, max_area: int | None = None) -> list[Box]:
    """Boxes of the connected regions of a binary map, in cells, in the order of their first cells.

    Args:
        binary: `(rows, columns)`.
        min_area: a region of fewer cells is widened to at least 3x3, and dropped if it is a single cell.
        max_area: a region of more cells is dropped; [`MAX_AREA_FRACTION`] of the map if not given.
    """
    if max_area is None:
        max_area = round(MAX_AREA_FRACTION * binary.numel())
    height, width = binary.shape
    boxes = []
    for component in connected_components(binary):
        area = int(component.sum())
        if not 1 < area <= max_area:
            continue
        x0, y0, x1, y1 = extent(component)
        if area < min_area:
            x0, x1 = _widened(x0, x1, width)
            y0, y1 = _widened(y0, y1, height)
        boxes.append((x0, y0, x1, y1))
    return boxes


def _widened(start: int, end: int, size: int) -> tuple[int, int]:
    """At least three cells around the middle of `start .. end`, by the official rule: no box reaches the last cell."""
    centre, width = (start + end) / 2, max(3, end - start + 1)
    return max(0, int(centre - width / 2)), min(size - 1, int(centre + width / 2))


def padded_to_image(box: Box, grid: tuple[int, int], image_size: tuple[int, int], encoder_size: int = 336) -> Box:
    """From cells to pixels of an image that was padded to a square.

    Args:
        box: in cells.
        grid: rows and columns of the map.
        image_size: width and height of the original image.
        encoder_size: side of the square input of the vision tower.
    """
    width, height = image_size
    longer = max(image_size)
    corners = []
    for position, (value, size) in enumerate(zip(box, (width, height, width, height), strict=True)):
        cells = grid[1 - position % 2]
        # In floats, as the official code does it: the result is one pixel short for a few sizes.
        padding = encoder_size - int(size * (encoder_size / longer))
        # Exact: in floats a corner on a whole pixel may come out just below it.
        pixel = (2 * value * encoder_size - padding * cells) * longer // (2 * cells * encoder_size)
        corners.append(min(max(pixel, 0), size))
    return tuple(corners)


def scaled_to_image(box: Box, grid: tuple[int, int], image_size: tuple[int, int]) -> Box:
    """From cells to pixels of an image that was resized as a whole; arguments as of [`padded_to_image`]."""
    width, height = image_size
    rows, columns = grid
    x0, y0, x1, y1 = box
    return x0 * width // columns, y0 * height // rows, x1 * width // columns, y1 * height // rows


def llava_regions(
    roi_map: torch.Tensor,
    threshold: float,
    image_size: tuple[int, int],
    encoder_size: int | None = 336,
    masked: bool = True,
) -> list[Region]:
    """Regions by connected components: LLaVA-1.5, and the view of the whole image of LLaVA-Next.

    A region that is entirely in the padding is ignored, in contrast to the official code, which would crop an image
    without pixels.

    Args:
        roi_map: probabilities `(rows, columns)`.
        threshold: of the blurred map; a negative one is a fraction of its maximum.
        image_size: width and height of the original image.
        encoder_size: side of the square that the image was padded to and resized to; none if it was resized to the square
            without padding.
        masked: of two or more regions, crop their extent and keep the tokens inside them (the paper's evaluation); if not,
            crop each of two regions, and none of more.
    """
    binary = above_threshold(blur(roi_map.float()), threshold)
    grid = tuple(binary.shape)

    def region(grid_box: Box, cells: torch.Tensor | None = None) -> Region:
        if encoder_size is None:
            box = scaled_to_image(grid_box, grid, image_size)
        else:
            box = padded_to_image(grid_box, grid, image_size, encoder_size)
        return Region(box, grid_box, cells)

    regions = [region for region in map(region, region_boxes(binary)) if _has_pixels(region.box)]
    if len(regions) < 2 or (not masked and len(regions) == 2):
        return regions
    if not masked:
        return []
    x0, y0, x1, y1 = grid_box = extent(binary)
    return [region(grid_box, binary[y0:y1, x0:x1])]


def qwen_regions(roi_map: torch.Tensor, threshold: float, image_size: tuple[int, int]) -> list[Region]:
    """The extent of all cells above the threshold, if there are any: Qwen2.5-VL; arguments as of [`llava_regions`]."""
    roi_map = roi_map.float().clone()
    rows, columns = roi_map.shape
    if roi_map.numel() > BORDER_ARTEFACTS_ABOVE:
        roi_map[torch.arange(rows, device=roi_map.device) < rows / 4, 0] = 0
        roi_map[0, torch.arange(columns, device=roi_map.device) < columns / 4] = 0
    binary = above_threshold(blur(roi_map), threshold)
    grid_box = extent(binary)
    if grid_box is None:
        return []
    box = scaled_to_image(grid_box, (rows, columns), image_size)
    x0, y0, x1, y1 = grid_box
    return [Region(box, grid_box, binary[y0:y1, x0:x1])] if _has_pixels(box) else []


def asked_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Which tokens of a large image Qwen2.5-VL reads again, `(tokens,)`: those that some token of the question looks at.

    Args:
        logits: `(queries, tokens)`, of the RoI map of each token of the question. All are read again if there is none.
    """
    if len(logits) == 0:
        return torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    return logits.amax(dim=0).sigmoid() > MIN_ASKED


def _has_pixels(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]
