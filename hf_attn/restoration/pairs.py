"""Pairs of low-resolution and high-resolution images for training and evaluation."""

from collections.abc import Sequence

import torch

from .degradation import degrade, sharpen
from .images import decode_image
from .metrics import to_uint8
from .resize import bicubic_downscale, crop_to_multiple


#: how low resolutions are made -> low-resolution pixels around a patch that this sees. The widened bicubic kernel reaches two
#: of them; the blurs of the second order mostly stay within eight.
DEGRADATIONS = {"bicubic": 3, "second_order": 8}


class Images(Sequence):
    """RGB images `(3, height, width)` of 8 bits, read on access.

    Args:
        sources: what `decode_image` takes.
        part: which columns to use: "left" three quarters, "right" quarter, or "all".
    """

    def __init__(self, sources: Sequence, part: str = "all"):
        self.sources = sources
        self.part = part

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        decoded = decode_image(self.sources[index])
        colour = decoded.colour if decoded.peak == 255 else to_uint8(decoded.colour / decoded.peak)
        cut = colour.shape[-1] * 3 // 4
        columns = {"all": slice(None), "left": slice(cut), "right": slice(cut, None)}[self.part]
        return colour.expand(3, -1, -1)[..., columns]


class Patches(torch.utils.data.Dataset):
    """Random patches with flips and quarter turns, in pairs of a low resolution and a high one.

    Args:
        images: images to cut from.
        scale: factor between the two.
        patch_size: side of the low-resolution patch.
        degradation: how the low resolution is made, one of [`DEGRADATIONS`].
        sharpen_targets: sharpen the labels; the low resolution is still made of the photograph.
        keep_originals: also return the photograph if labels are sharpened.
    """

    def __init__(
        self,
        images: Images,
        scale: int,
        patch_size: int,
        degradation: str = "bicubic",
        sharpen_targets: bool = False,
        keep_originals: bool = False,
    ):
        self.images, self.scale, self.patch_size = images, scale, patch_size
        self.degradation, self.sharpen_targets, self.keep_originals = degradation, sharpen_targets, keep_originals

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scale, side = self.scale, self.patch_size
        image = crop_to_multiple(self.images[index], scale)
        if min(image.shape[-2:]) < scale * side:
            raise ValueError(
                f"Training image {index} is {image.shape[-2]}x{image.shape[-1]}, smaller than patches of "
                f"{scale * side}. Leave it out, or use smaller patches."
            )
        start = [int(torch.randint(length // scale - side + 1, ())) for length in image.shape[-2:]]
        context = DEGRADATIONS[self.degradation]
        before = [min(position, context) for position in start]
        around = [
            slice(scale * (position - margin), scale * (position + side + context))
            for position, margin in zip(start, before, strict=True)
        ]
        high = image[:, around[0], around[1]].float() / 255
        turns, flip = int(torch.randint(4, ())), bool(torch.randint(2, ()))

        def cut(region: torch.Tensor, scale: int) -> torch.Tensor:
            top, left = (scale * margin for margin in before)
            patch = region[:, top : top + scale * side, left : left + scale * side].rot90(turns, (-2, -1))
            return (patch.flip(-1) if flip else patch).contiguous()

        example = {
            "pixel_values": cut(low_resolution(high, scale, self.degradation), 1),
            "labels": cut(sharpen(high) if self.sharpen_targets else high, scale),
        }
        if self.sharpen_targets and self.keep_originals:
            example["originals"] = cut(high, scale)
        return example


class WholeImages(torch.utils.data.Dataset):
    """Images, or their central crops, in pairs of a low resolution and a high one; always the same pairs."""

    def __init__(self, images: Images, scale: int, max_side: int | None, degradation: str = "bicubic"):
        self.images, self.scale, self.max_side, self.degradation = images, scale, max_side, degradation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.images[index]
        if self.max_side:
            height, width = image.shape[-2:]
            top, left = max(height - self.max_side, 0) // 2, max(width - self.max_side, 0) // 2
            image = image[:, top : top + self.max_side, left : left + self.max_side]
        high = crop_to_multiple(image, self.scale).float() / 255
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": low_resolution(high, self.scale, self.degradation, generator), "labels": high}


def low_resolution(
    high: torch.Tensor, scale: int, degradation: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The low resolution of a photograph `(3, height, width)`, in steps of 1/255."""
    if degradation == "second_order":
        return degrade(high, scale, generator)
    return round_to_8_bits(bicubic_downscale(high, scale))


def round_to_8_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] in steps of 1/255."""
    return to_uint8(images).float() / 255
