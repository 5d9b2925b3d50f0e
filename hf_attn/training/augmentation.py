"""Augmentation of training images that also returns the cropped region, so that label maps can be cropped alike."""

from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional


class View(NamedTuple):
    """The part of an image that a training image shows.

    Attributes:
        top, left, bottom, right: borders as shares of the height and width of the image, 0 to 1; beyond them where the part
            reaches over the border.
        mirrored: whether left and right are exchanged.
    """

    top: float
    left: float
    bottom: float
    right: float
    mirrored: bool = False


class Augmentation:
    """Turns an image into a training image.

    Args:
        kind: `"shift"`, moved by up to an eighth of its size; `"photo"`, a random part, mirrored or not, and RandAugment.
        size: height and width of the result.
        mean, std: of each channel, for normalisation.
    """

    def __init__(self, kind: str, size: tuple[int, int], mean: list[float], std: list[float]):
        self.kind, self.size = kind, size
        self.crop = v2.RandomResizedCrop(size)
        self.finish = v2.Compose(
            [
                *([v2.RandAugment()] if kind == "photo" else []),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, View]:
        """Returns:
        Pixel values `(channels, height, width)`, and the part of the image that they show. What RandAugment turns and
        shears is not in it.
        """
        image, view = self._shifted(image) if self.kind == "shift" else self._part(image)
        return self.finish(image), view

    def _shifted(self, image: Image.Image) -> tuple[Image.Image, View]:
        height, width = self.size
        below, beside = height // 8, width // 8
        image = functional.resize(image, [height, width], InterpolationMode.BICUBIC)
        image = functional.pad(image, [beside, below])
        top, left, _, _ = v2.RandomCrop.get_params(image, self.size)
        image = functional.crop(image, top, left, height, width)
        top, left = (top - below) / height, (left - beside) / width
        return image, View(top, left, top + 1, left + 1)

    def _part(self, image: Image.Image) -> tuple[Image.Image, View]:
        full_width, full_height = image.size
        top, left, height, width = v2.RandomResizedCrop.get_params(image, self.crop.scale, self.crop.ratio)
        image = functional.resized_crop(image, top, left, height, width, list(self.size), InterpolationMode.BICUBIC)
        mirrored = bool(torch.rand(1) < 0.5)
        if mirrored:
            image = functional.horizontal_flip(image)
        view = View(
            top / full_height, left / full_width, (top + height) / full_height, (left + width) / full_width, mirrored
        )
        return image, view
