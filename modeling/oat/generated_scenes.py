"""Generated shelves of coloured rectangles with simulated searches, for examples and tests."""

from dataclasses import dataclass

import numpy as np

from .layout import grid_boxes
from .trials import Trial


@dataclass
class SceneGenerator:
    """Draws shelves and simulates how people search on them.

    A search starts at the centre. The next fixation is drawn with a probability proportional to exp(`likeness` * s - d^2 / 8), where
    s is the likeness of the object's colour to that of the target, from 0 to 1, and d the distance in cells; times `return_weight`
    for objects that have been looked at. It ends at the target.

    Args:
        rows: rows of the shelf.
        columns: columns of the shelf.
        cell: side of an object in pixels.
        colours: number of colours; several objects have one of them.
        likeness: how much the colour guides the search.
        return_weight: how readily objects are looked at again, from 0 (never) to 1 (as others).
        max_length: fixations after which a search is given up.
    """

    rows: int = 4
    columns: int = 6
    cell: int = 24
    colours: int = 6
    likeness: float = 8.0
    return_weight: float = 0.3
    max_length: int = 24

    def trials(self, num_images: int, searches: int, seed: int) -> list[Trial]:
        """Searches of several people on each of several images; equal seeds give equal trials."""
        generator = np.random.default_rng(seed)
        return [trial for index in range(num_images) for trial in self._image(f"{seed}-{index}", searches, generator)]

    def _image(self, name: str, searches: int, generator: np.random.Generator) -> list[Trial]:
        height, width = self.rows * self.cell, self.columns * self.cell
        boxes = grid_boxes(self.rows, self.columns, height, width)
        palette = generator.uniform(0.1, 0.9, (self.colours, 3))
        colours = palette[generator.integers(self.colours, size=len(boxes))]
        colours = (colours + generator.normal(0, 0.04, colours.shape)).clip(0, 1)
        image = np.full((height, width, 3), 255, dtype=np.uint8)
        margin = self.cell // 8
        for (x1, y1, x2, y2), colour in zip(boxes.tolist(), colours, strict=True):
            image[y1 + margin : y2 - margin, x1 + margin : x2 - margin] = (255 * colour).astype(np.uint8)
        target = int(generator.integers(len(boxes)))
        return [
            Trial(
                image_id=name,
                image=image,
                boxes=boxes,
                target_index=target,
                scanpath=self._search(colours, target, generator),
                grid=(self.rows, self.columns),
            )
            for _ in range(searches)
        ]

    def _search(self, colours: np.ndarray, target: int, generator: np.random.Generator) -> list[int]:
        cells = np.stack(np.divmod(np.arange(len(colours)), self.columns), axis=1)
        likeness = 1 - np.linalg.norm(colours - colours[target], axis=1) / np.sqrt(3)
        place, last, scanpath = (np.array([self.rows, self.columns]) - 1) / 2, -1, []
        while len(scanpath) < self.max_length and last != target:
            logits = self.likeness * likeness - ((cells - place) ** 2).sum(1) / 8
            weights = np.exp(logits - logits.max())
            weights[scanpath] *= self.return_weight
            last = int(generator.choice(len(colours), p=weights / weights.sum()))
            place = cells[last]
            scanpath.append(last)
        return scanpath
