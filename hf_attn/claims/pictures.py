"""Two image datasets that come with installed packages, and classifiers that learn them in seconds.

`digits` are the 1,797 handwritten digits of scikit-learn. `textures` are greyscale crops of twelve photographs of scikit-image;
the class is the photograph. Training, validation and test sets use different parts of each photograph.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .training import batches, logits_of, loss_and_accuracy, optimise


SIZE = 32
DATASETS = ("digits", "textures")
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
)
BATCH_SIZE = 32
#: maximum random shift of an image in training, in pixels
SHIFT = 2


class Pictures(NamedTuple):
    """Images `(count, 1, SIZE, SIZE)` and classes `(count,)`."""

    pixels: torch.Tensor
    labels: torch.Tensor


@cache
def load(name: str) -> dict[str, Pictures]:
    """The parts `train`, `validation` and `test` of `digits` or `textures`.

    Raises:
        ImportError: if scikit-learn or scikit-image is not installed.
    """
    return {"digits": _digits, "textures": _textures}[name]()


def num_classes(name: str) -> int:
    return {"digits": 10, "textures": len(PHOTOGRAPHS)}[name]


def _digits() -> dict[str, Pictures]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = F.interpolate(pixels, SIZE, mode="bilinear")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(digits.target)
    parts = zip(("train", "validation", "test"), order.split([1097, 200, 500]), strict=True)
    return {name: Pictures(pixels[part], labels[part]) for name, part in parts}


def _textures() -> dict[str, Pictures]:
    import skimage.data
    from skimage.color import rgb2gray

    rng = np.random.default_rng(0)
    found = {name: ([], []) for name in ("train", "validation", "test")}
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = getattr(skimage.data, name)()
        grey = rgb2gray(photograph[..., :3]) if photograph.ndim == 3 else photograph / 255
        # Normalised, so that neither brightness nor contrast distinguishes the photographs.
        grey = (grey - grey.mean()) / grey.std()
        width = grey.shape[1]
        for part, (left, right), count in (
            ("train", (0, 0.6), 150),
            ("validation", (0.6, 0.75), 20),
            ("test", (0.75, 1), 50),
        ):
            first, last = int(left * width), int(right * width) - SIZE
            for _ in range(count):
                row, column = rng.integers(grey.shape[0] - SIZE), rng.integers(first, last)
                found[part][0].append(grey[row : row + SIZE, column : column + SIZE])
                found[part][1].append(label)
    return {
        part: Pictures(torch.tensor(np.stack(pixels), dtype=torch.float32)[:, None], torch.tensor(labels))
        for part, (pixels, labels) in found.items()
    }


def train_classifier(
    make_model: Callable[[int], nn.Module], dataset: str, steps: int, seed: int, rate: float
) -> tuple[nn.Module, dict[str, float]]:
    """Train a classifier of greyscale images.

    Args:
        make_model: makes a model with random weights for a number of classes.
        dataset: one of [`DATASETS`].
        steps: number of steps of `BATCH_SIZE` images.
        seed: of the weights and of the order of the images.
        rate: highest learning rate.

    Returns:
        The model, and its loss on the validation part (`validation`) and its accuracy on the test part in percent (`accuracy`).
    """
    torch.manual_seed(seed)
    model, parts = make_model(num_classes(dataset)), load(dataset)
    pixels, labels = parts["train"]
    order = batches(len(pixels), BATCH_SIZE, seed)

    def loss() -> torch.Tensor:
        chosen = next(order)
        shifts = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        return F.cross_entropy(logits_of(model(pixels[chosen].roll(shifts, (2, 3)))), labels[chosen])

    optimise(model, loss, steps, rate)
    validation, _ = loss_and_accuracy(model, *parts["validation"])
    _, accuracy = loss_and_accuracy(model, *parts["test"])
    return model, {"validation": validation, "accuracy": accuracy}
