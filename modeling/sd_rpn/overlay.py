"""An overlay of the RoI map and the boxes on the image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .regions import Box


if TYPE_CHECKING:
    from PIL.Image import Image


#: colours of a map from 0 to 1
_COLD, _HOT = (20, 30, 90), (255, 70, 0)
_BOX = (0, 255, 90)


def overlay(
    image: "Image", roi_map: torch.Tensor, boxes: Sequence[Box], padded: bool, opacity: float = 0.55
) -> "Image":
    """Draw a RoI map and boxes over an image.

    Args:
        image: the original image.
        roi_map: probabilities `(rows, columns)`.
        boxes: in pixels of the image.
        padded: whether the map is of the image padded to a square.
        opacity: of the veil, between 0 (the image alone) and 1 (the map alone).

    Returns:
        An RGB image of the size of the original.
    """
    from PIL import Image, ImageDraw

    cells = Image.fromarray((roi_map.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    width, height = image.size
    if padded:
        side = max(image.size)
        left, top = (side - width) // 2, (side - height) // 2
        veil = cells.resize((side, side), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    else:
        veil = cells.resize(image.size, Image.Resampling.BILINEAR)
    colours = [
        Image.eval(veil, lambda p, a=a, b=b: round(a + (b - a) * p / 255)) for a, b in zip(_COLD, _HOT, strict=True)
    ]
    picture = Image.blend(image.convert("RGB"), Image.merge("RGB", colours), opacity)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(image.size) / 200))
    for x0, y0, x1, y1 in boxes:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_BOX, width=line)
    return picture
