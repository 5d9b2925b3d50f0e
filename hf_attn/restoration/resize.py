"""Bicubic resizing as MATLAB's `imresize` does it, which makes the low-resolution images of super-resolution papers."""

import math

import torch


def bicubic_resize(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Resize by a factor: bicubic kernel (a = -0.5), widened by the factor when it shrinks, mirrored borders.

    Args:
        images: `(..., height, width)`, floating.
        scale: factor on both sides, rounded up to whole pixels.

    Returns:
        The resized images, neither clamped nor rounded.

    Raises:
        ValueError: if the factor is not positive or the images are not floating.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point tensors, got {images.dtype}.")
    rows = _weights(images.shape[-2], scale).to(images.device, images.dtype)
    columns = _weights(images.shape[-1], scale).to(images.device, images.dtype)
    return rows @ images @ columns.T


def bicubic_downscale(images: torch.Tensor, scale: int) -> torch.Tensor:
    """The low-resolution counterpart of images whose sides are multiples of `scale`.

    Raises:
        ValueError: if the sides are not multiples; [`crop_to_multiple`] makes them so.
    """
    if any(side % scale for side in images.shape[-2:]):
        raise ValueError(
            f"Height and width, {tuple(images.shape[-2:])}, are not multiples of {scale}: crop the images first."
        )
    return bicubic_resize(images, 1 / scale)


def crop_to_multiple(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Cut rows and columns off at the bottom and the right until the sides are multiples."""
    height, width = (side - side % multiple for side in images.shape[-2:])
    return images[..., :height, :width]


def _weights(size: int, scale: float) -> torch.Tensor:
    """Matrix `(resized, size)` of one axis, in float64."""
    resized = math.ceil(size * scale)
    shrink = min(scale, 1.0)
    width = 4 / shrink
    # Centres of the output pixels in input pixels, both counted from 1.
    centre = torch.arange(1, resized + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    first = torch.floor(centre - width / 2)
    position = first[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weight = _bicubic((centre[:, None] - position) * shrink)
    weight /= weight.sum(1, keepdim=True)
    # 1...size, size...1 and so on
    index = (position.long() - 1) % (2 * size)
    index = torch.where(index < size, index, 2 * size - 1 - index)
    return torch.zeros(resized, size, dtype=torch.float64).scatter_add_(1, index, weight)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, 0.0))
