"""Label maps for token labelling: what a teacher says of each part of an image (arXiv 2104.10858).

A map is an array, in a file beside its image (`cat/1.jpg` and `cat/1.npy` or `cat/1.pt`) or in a column `label_map`, in one
of three forms; height and width are free, and the map covers the whole image:

- `(height, width)`, whole numbers: the class of each cell;
- `(classes, height, width)`, numbers that are not negative: the share of each class in each cell;
- `(2, k, height, width)`: the shares of the k best classes of each cell, and the numbers of these classes.

The shares of a cell are divided by their sum.
"""

from pathlib import Path

import numpy as np
import torch

from .modeling_rmt import RMTForImageClassification
from .token_labeling import position_grid


def read_label_map(path: str | Path) -> torch.Tensor:
    """The map beside an image.

    Args:
        path: of the image.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file cannot be read or is not an array.
    """
    files = [Path(path).with_suffix(suffix) for suffix in (".npy", ".pt")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} has no label map: there is neither {files[0].name} nor {files[1].name} next to it."
        )
    try:
        if found.suffix == ".npy":
            return torch.from_numpy(np.load(found, allow_pickle=False))
        return torch.as_tensor(torch.load(found, map_location="cpu", weights_only=True))
    except Exception as error:  # of many kinds
        raise ValueError(f"{found} is not an array of numbers: {str(error).splitlines()[0]}") from error


def label_targets(
    label_map: torch.Tensor,
    num_labels: int,
    grid: tuple[int, int],
    part: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    mirrored: bool = False,
    name: str = "The label map",
) -> torch.Tensor:
    """Soft targets for a part of an image: the mean of the map over the part, and over each position of the model.

    Args:
        label_map: in one of the three forms.
        num_labels: number of classes.
        grid: positions of the model's last feature map, height and width.
        part: top, left, bottom and right border as shares of the height and width of the image. Beyond the image the map
            goes on as at its border.
        mirrored: whether left and right are exchanged.
        name: of the map, for errors.

    Returns:
        `(num_labels, 1 + positions)`; each column sums to 1.

    Raises:
        ValueError: if the map has another shape, or contains numbers that are neither probabilities nor classes.
    """
    shares, classes = _shares(torch.as_tensor(label_map), num_labels, name)
    top, left, bottom, right = part
    columns = []
    for height, width in ((1, 1), grid):
        rows, across = (
            _overlap(start, end, count, size)
            for start, end, count, size in (
                (top, bottom, height, shares.shape[1]),
                (left, right, width, shares.shape[2]),
            )
        )
        means = torch.einsum("chw,ih,jw->cij", shares, rows, across.flip(0) if mirrored else across)
        columns.append(means.flatten(1))
    targets = torch.zeros(num_labels, 1 + grid[0] * grid[1])
    targets[classes] = torch.cat(columns, dim=1)
    return targets


class TokenTargets:
    """Soft targets of what a training image shows, from the map of its image.

    Args:
        model: a model whose images are all of `config.image_size`.
    """

    def __init__(self, model: RMTForImageClassification):
        self.num_labels, size = model.config.num_labels, model.config.image_size
        size = (size, size) if isinstance(size, int) else size
        self.grid = position_grid(model, torch.empty(1, model.config.num_channels, *size, device="meta"))

    def __call__(
        self,
        label_map: torch.Tensor | list | None,
        path: str | None,
        part: tuple = (0, 0, 1, 1),
        mirrored: bool = False,
    ) -> torch.Tensor:
        """Args:
            label_map: the map; it is read from the file beside the image if there is none.
            path: of the image, if it has one.
            part, mirrored: what the training image shows, see [`label_targets`].

        Returns:
            `(num_labels, 1 + positions)`.
        """
        if label_map is None and path is None:
            raise ValueError("Images that are not in files need their label maps in a column `label_map`.")
        label_map = read_label_map(path) if label_map is None else torch.as_tensor(label_map)
        name = f"The label map of {path or 'an image'}"
        return label_targets(label_map, self.num_labels, self.grid, part, mirrored, name)


def _shares(label_map: torch.Tensor, num_labels: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares `(found, height, width)` of the classes that occur, and their numbers `(found,)`."""
    shape = tuple(label_map.shape)
    dense, best = label_map.ndim == 3 and shape[0] == num_labels, label_map.ndim == 4 and shape[0] == 2
    if not (label_map.ndim == 2 or dense or best) or 0 in shape:
        raise ValueError(
            f"{name} has the shape {shape}; it must be (height, width), ({num_labels}, height, width) for {num_labels} classes, or "
            "(2, k, height, width)."
        )
    label_map = label_map.double()
    weights = label_map if dense else torch.ones(1, *shape, dtype=torch.double)
    numbers = label_map[None]
    if best:
        weights, numbers = label_map
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights.sum(0) > 0).all()):
        raise ValueError(
            f"{name} must contain non-negative numbers, at least one of them positive in each cell. If these are "
            "logits, apply a softmax first."
        )
    weights = weights / weights.sum(0)
    if dense:
        return weights.float(), torch.arange(num_labels)
    if (numbers != numbers.round()).any() or numbers.min() < 0 or numbers.max() >= num_labels:
        raise ValueError(
            f"{name} has classes from {numbers.min().item():g} to {numbers.max().item():g}; they must be integers "
            f"between 0 and {num_labels - 1}."
        )
    classes = numbers.unique()
    shares = torch.stack([(weights * (numbers == number)).sum(0) for number in classes])
    return shares.float(), classes.long()


def _overlap(start: float, end: float, count: int, size: int) -> torch.Tensor:
    """How much of each of `count` equal pieces of an interval lies in each of `size` equal cells of [0, 1], `(count, size)`.

    The outer cells have no end, and each row sums to 1.
    """
    pieces = torch.linspace(start, end, count + 1, dtype=torch.double)
    cells = torch.linspace(0, 1, size + 1, dtype=torch.double)
    cells[0], cells[-1] = -torch.inf, torch.inf
    common = torch.minimum(pieces[1:, None], cells[1:]) - torch.maximum(pieces[:-1, None], cells[:-1])
    common = common.clamp(min=0)
    return (common / common.sum(1, keepdim=True)).float()


__all__ = ["TokenTargets", "label_targets", "read_label_map"]
