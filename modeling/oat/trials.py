"""Trials, in which a person searches for an object in an image; their dataset, and its split by image."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_attn.restoration.images import ImageLike

from .layout import box_centres, check_boxes, grid_positions, objects_at
from .processing_oat import OATImageProcessor


@dataclass
class Trial:
    """One search of one person.

    Attributes:
        image_id: name of the image; trials with the same name share the image and its boxes.
        image: the image, or where it is.
        boxes: `(objects, 4)`, x1, y1, x2, y2 in pixels.
        target_index: the object that was searched for.
        scanpath: the objects in the order in which they were looked at.
        points: the fixations in pixels, `(length, 2)`; the centres of the objects if they are not known.
        grid: rows and columns, if the objects fill a grid.
    """

    image_id: str
    image: ImageLike
    boxes: torch.Tensor
    target_index: int
    scanpath: list[int]
    points: np.ndarray | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        if not self.scanpath:
            raise ValueError(f"A scanpath in {self.image_id} has no fixations.")
        wrong = [index for index in (self.target_index, *self.scanpath) if not 0 <= index < len(self.boxes)]
        if wrong:
            raise ValueError(
                f"Object {wrong[0]} is out of range: {self.image_id} has {len(self.boxes)} objects, counted from 0."
            )

    @classmethod
    def from_fixations(cls, fixations: Sequence | np.ndarray, boxes: torch.Tensor, **fields) -> "Trial":
        """A trial of fixations in pixels; each is at the object whose box holds it, or else the nearest."""
        points = np.asarray(fixations, dtype=float).reshape(-1, 2)
        return cls(boxes=boxes, scanpath=objects_at(points, boxes).tolist(), points=points, **fields)

    @property
    def fixations(self) -> np.ndarray:
        """Fixations in pixels."""
        return self.centres(self.scanpath) if self.points is None else self.points

    def centres(self, scanpath: Sequence[int]) -> np.ndarray:
        """A scanpath of objects in pixels, `(length, 2)`."""
        return box_centres(self.boxes)[list(scanpath)].double().numpy().reshape(-1, 2)


class ScanpathDataset(Dataset):
    """Trials as inputs of the model; make batches with [`hf_attn.modeling.oat.processing_oat.collate_scenes`].

    Args:
        trials: the trials.
        processor: cuts the images.
        cached_images: images of which the crops are kept in memory.
    """

    def __init__(self, trials: Sequence[Trial], processor: OATImageProcessor, cached_images: int = 32):
        self.trials = list(trials)
        self.processor = processor
        self._first = {trial.image_id: trial for trial in reversed(self.trials)}
        self._scene = lru_cache(maxsize=cached_images)(self._read)

    def _read(self, image_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        trial = self._first[image_id]
        pixels = self.processor.read_image(trial.image)
        boxes = check_boxes(trial.boxes, *pixels.shape[1:])
        return self.processor.crop(pixels, boxes), grid_positions(boxes, trial.grid, self.processor.row_height)

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        trial = self.trials[index]
        pixel_values, positions = self._scene(trial.image_id)
        return {
            "pixel_values": pixel_values,
            "object_positions": positions,
            "target_index": torch.tensor(trial.target_index),
            "scanpath": torch.tensor(trial.scanpath),
        }


def split_by_image(
    trials: Sequence[Trial], shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> list[list[Trial]]:
    """Split trials so that no image is in two parts.

    The official split shuffles trials, and so has each image, and copies of one scanpath, on both sides.

    Args:
        trials: the trials.
        shares: shares of the images; each part gets at least one.
        seed: of the shuffle.

    Raises:
        ValueError: if there are fewer images than parts.
    """
    images = sorted({trial.image_id for trial in trials})
    if len(images) < len(shares):
        raise ValueError(
            f"{len(images)} images cannot be split into {len(shares)} parts, because each image belongs to only one "
            "part."
        )
    random.Random(seed).shuffle(images)
    ends = [round(sum(shares[: part + 1]) / sum(shares) * len(images)) for part in range(len(shares))]
    starts = [0, *ends[:-1]]
    for part in range(1, len(shares)):
        starts[part] = min(max(starts[part], starts[part - 1] + 1), len(images) - len(shares) + part)
    parts = {}
    for part, (start, end) in enumerate(zip(starts, [*starts[1:], len(images)], strict=True)):
        parts |= dict.fromkeys(images[start:end], part)
    return [[trial for trial in trials if parts[trial.image_id] == part] for part in range(len(shares))]


def without_outliers(trials: Sequence[Trial], deviations: float = 3.0) -> list[Trial]:
    """Drop scanpaths that are longer than the mean length and this many standard deviations, as the paper's data is prepared."""
    lengths = np.array([len(trial.scanpath) for trial in trials])
    limit = lengths.mean() + deviations * lengths.std()
    return [trial for trial, length in zip(trials, lengths, strict=True) if length <= limit]
