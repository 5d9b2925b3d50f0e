"""Drawings of scanpaths: boxes, numbered circles, arrows."""

import math
from collections.abc import Sequence

import torch

from .layout import box_centres


try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("Images are drawn with Pillow: `pip install 'hf_attn[vision]'`.") from error


BOX, TARGET, PATH, TEXT = (150, 150, 150), (0, 160, 60), (215, 40, 60), (255, 255, 255)


def draw_scanpath(
    image: Image.Image,
    boxes: torch.Tensor,
    scanpath: Sequence[int],
    target_index: int,
    colour: tuple[int, int, int] = PATH,
) -> Image.Image:
    """Draw a scanpath on a copy of its image.

    The target has a thick green frame. The path starts at the centre of the image; each fixation is a circle with its number,
    and further fixations of one object are drawn next to the first.

    Args:
        image: the image.
        boxes: `(objects, 4)`.
        scanpath: objects in the order in which they are looked at.
        target_index: the object that is searched for.
        colour: of the path.

    Raises:
        ValueError: if the target or a fixation is not an object.
    """
    wrong = [index for index in (target_index, *scanpath) if not 0 <= index < len(boxes)]
    if wrong:
        raise ValueError(f"Object {wrong[0]} is out of range: there are {len(boxes)} boxes, counted from 0.")
    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture)
    size = (boxes[:, 2:] - boxes[:, :2]).double().median().item()
    radius = max(5.0, min(0.16 * size, 0.04 * max(picture.size)))
    line = max(1, round(radius / 5))
    for box in boxes.tolist():
        draw.rectangle(box, outline=BOX, width=max(1, line // 2))
    draw.rectangle(boxes[target_index].tolist(), outline=TARGET, width=2 * line)

    points = _places(box_centres(boxes)[list(scanpath)].tolist(), scanpath, 1.5 * radius)
    start = (picture.width / 2, picture.height / 2)
    for index, (begin, end) in enumerate(zip([start, *points], points)):  # noqa: B905
        _arrow(draw, begin, end, 0 if index == 0 else radius, radius, colour, line)
    font = ImageFont.load_default(size=1.1 * radius)
    for number, (x, y) in enumerate(points, start=1):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=TEXT, width=max(1, line // 2)
        )
        draw.text((x, y), str(number), fill=TEXT, font=font, anchor="mm")
    return picture


def _places(centres: list[list[float]], scanpath: Sequence[int], step: float) -> list[tuple[float, float]]:
    """Centres of the circles, so that those of one object do not hide each other."""
    seen: dict[int, int] = {}
    places = []
    for (x, y), index in zip(centres, scanpath, strict=True):
        visit = seen[index] = seen.get(index, -1) + 1
        angle = 2.4 * visit
        distance = step * math.sqrt(visit)
        places.append((x + distance * math.cos(angle), y + distance * math.sin(angle)))
    return places


def _arrow(draw, begin, end, begin_gap: float, end_gap: float, colour, line: int) -> None:
    length = math.dist(begin, end)
    if length <= begin_gap + end_gap:
        return
    x, y = ((after - before) / length for before, after in zip(begin, end, strict=True))
    tail = (begin[0] + begin_gap * x, begin[1] + begin_gap * y)
    tip = (end[0] - end_gap * x, end[1] - end_gap * y)
    head = 4 * line
    neck = (tip[0] - head * x, tip[1] - head * y)
    draw.line((*tail, *neck), fill=colour, width=line)
    draw.polygon(
        [tip, (neck[0] - head / 2 * y, neck[1] + head / 2 * x), (neck[0] + head / 2 * y, neck[1] - head / 2 * x)],
        fill=colour,
    )
