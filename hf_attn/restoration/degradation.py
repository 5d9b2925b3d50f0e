"""Degradations of real photographs: Real-ESRGAN's second-order model (arXiv 2107.10833), by which Real-HAT and Real-DRCT learn.

Blur, resizing, noise and JPEG compression, all twice, and a sinc filter at the end. Images are `(channels, height, width)` in
[0, 1]. All that is random comes from a generator, or from PyTorch's global one if it is None.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..architectures.restoration.layers import mirror


try:
    from PIL import Image
except ImportError as error:
    raise ImportError("Images are compressed with Pillow: `pip install 'hf_attn[vision]'`.") from error


Range = tuple[float, float]

#: sides of the random kernels
_SIDES = tuple(range(7, 22, 2))
#: shape, whether its two axes differ, probability
_SHAPES = (
    ("gaussian", False, 0.45),
    ("gaussian", True, 0.25),
    ("generalised", False, 0.12),
    ("generalised", True, 0.03),
    ("plateau", False, 0.12),
    ("plateau", True, 0.03),
)
_SINC_PROBABILITY = 0.1
_FINAL_SINC_PROBABILITY = 0.8
_GREY_NOISE_PROBABILITY = 0.4
_RESIZE_MODES = ("area", "bilinear", "bicubic")
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Degradation:
    """Ranges of one of the two rounds.

    Attributes:
        blur: probability of a blur.
        sigma: standard deviation of the blur in pixels.
        resize: probabilities of enlarging, shrinking and keeping the size.
        factor: smallest and largest factor of the resizing.
        noise: standard deviation of Gaussian noise, on the 0-255 scale.
        poisson: factor on Poisson noise, which takes turns with Gaussian noise.
        quality: of JPEG.
    """

    blur: float
    sigma: Range
    resize: tuple[float, float, float]
    factor: Range
    noise: Range
    poisson: Range
    quality: Range = (30, 95)


FIRST = Degradation(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
SECOND = Degradation(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))


def degrade(image: torch.Tensor, scale: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The low-resolution counterpart of a photograph as a camera and the web would leave it.

    Args:
        image: `(1 or 3, height, width)` in [0, 1], both sides multiples of `scale`.
        scale: factor by which both sides shrink.
        generator: source of randomness.

    Returns:
        `(channels, height / scale, width / scale)` in [0, 1], in steps of 1/255.

    Raises:
        ValueError: if the sides are not multiples of the scale, or the image is empty.
    """
    height, width = image.shape[-2:]
    if 0 in image.shape or height % scale or width % scale:
        raise ValueError(f"Height and width of an image must be positive multiples of {scale}, got {height}x{width}.")
    size = (height // scale, width // scale)

    degraded = filter_image(image, random_kernel(FIRST.sigma, generator))
    factor = _random_factor(FIRST, generator)
    degraded = _resize(degraded, (int(height * factor), int(width * factor)), generator)
    degraded = add_noise(degraded, FIRST, generator)
    degraded = compress(degraded, _uniform(FIRST.quality, generator))

    if _chance(SECOND.blur, generator):
        degraded = filter_image(degraded, random_kernel(SECOND.sigma, generator))
    factor = _random_factor(SECOND, generator)
    degraded = _resize(degraded, (int(size[0] * factor), int(size[1] * factor)), generator)
    degraded = add_noise(degraded, SECOND, generator)

    quality = _uniform(SECOND.quality, generator)
    compress_last = _chance(0.5, generator)
    if not compress_last:
        degraded = compress(degraded, quality)
    degraded = _resize(degraded, size, generator)
    if _chance(_FINAL_SINC_PROBABILITY, generator):
        side = _choice(_SIDES, generator)
        degraded = filter_image(degraded, sinc_kernel(side, _uniform((math.pi / 3, math.pi), generator)))
    if compress_last:
        degraded = compress(degraded, quality)
    return (degraded.clamp(0, 1) * 255).round() / 255


def sharpen(image: torch.Tensor, amount: float = 0.5, side: int = 51, threshold: float = 10.0) -> torch.Tensor:
    """Unsharp masking, where the image differs from its blur by more than `threshold` of 255, with soft transitions."""
    # What OpenCV takes for a Gaussian of this side.
    sigma = 0.3 * ((side - 1) / 2 - 1) + 0.8
    kernel = gaussian_kernel(side, (sigma, sigma))
    residual = image - filter_image(image, kernel)
    mask = filter_image((residual.abs() * 255 > threshold).to(image.dtype), kernel)
    sharp = (image + amount * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * image


def filter_image(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Each channel filtered by an odd square kernel; the border is mirrored."""
    margin = kernel.shape[-1] // 2
    for dim in (-2, -1):
        image = mirror(image, dim, margin, margin)
    return F.conv2d(image[:, None], kernel.to(image.dtype)[None, None])[:, 0]


def random_kernel(sigma: Range, generator: torch.Generator | None = None) -> torch.Tensor:
    """A blur: mostly a Gaussian or one of its relatives, sometimes a sinc filter; of a random side from 7 to 21."""
    side = _choice(_SIDES, generator)
    if _chance(_SINC_PROBABILITY, generator):
        return sinc_kernel(side, _uniform((math.pi / 3 if side < 13 else math.pi / 5, math.pi), generator))
    shape, elliptic, _ = _SHAPES[_weighted([probability for *_, probability in _SHAPES], generator)]
    sigma_x = _uniform(sigma, generator)
    sigma_y = _uniform(sigma, generator) if elliptic else sigma_x
    angle = _uniform((-math.pi, math.pi), generator) if elliptic else 0.0
    power = 1.0
    if shape != "gaussian":
        low, high = (0.5, 4.0) if shape == "generalised" else (1.0, 2.0)
        power = _uniform((low, 1.0), generator) if _chance(0.5, generator) else _uniform((1.0, high), generator)
    return gaussian_kernel(side, (sigma_x, sigma_y), angle, power, plateau=shape == "plateau")


def gaussian_kernel(
    side: int, sigma: Range, angle: float = 0.0, power: float = 1.0, plateau: bool = False
) -> torch.Tensor:
    """`exp(-d^power / 2)`, or `1 / (1 + d^power)` with a plateau, normalised, where `d` is the squared Mahalanobis distance.

    Args:
        side: odd number of rows and columns.
        sigma: standard deviations along the two axes.
        angle: by which the axes are turned, in radians.
        power: 1 for a Gaussian.
        plateau: the second form.
    """
    position = torch.arange(side) - side // 2
    y, x = position[:, None], position[None, :]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    distance = ((along / sigma[0]) ** 2 + (across / sigma[1]) ** 2) ** power
    kernel = 1 / (1 + distance) if plateau else torch.exp(-distance / 2)
    return kernel / kernel.sum()


def sinc_kernel(side: int, cutoff: float) -> torch.Tensor:
    """The circular low-pass filter that cuts frequencies above `cutoff` (radians a pixel) off, normalised; it rings."""
    position = torch.arange(side, dtype=torch.float64) - side // 2
    radius = (position[:, None] ** 2 + position[None, :] ** 2).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[side // 2, side // 2] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def add_noise(image: torch.Tensor, ranges: Degradation, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian or Poisson noise, sometimes the same in all channels; clamped to [0, 1]."""
    grey = _chance(_GREY_NOISE_PROBABILITY, generator)
    if _chance(0.5, generator):
        sigma = _uniform(ranges.noise, generator) / 255
        noise = sigma * torch.randn(image[:1].shape if grey else image.shape, generator=generator)
    else:
        clean = image
        if grey and len(image) == 3:
            clean = (image * image.new_tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)
        clean = (clean.clamp(0, 1) * 255).round() / 255
        # As many photons as the image has values.
        photons = 2 ** math.ceil(math.log2(clean.unique().numel()))
        noise = torch.poisson(clean * photons, generator=generator) / photons - clean
        noise = _uniform(ranges.poisson, generator) * noise
    return (image + noise).clamp(0, 1)


def compress(image: torch.Tensor, quality: float) -> torch.Tensor:
    """To JPEG and back."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels).save(buffer, "JPEG", quality=round(quality))
    pixels = torch.from_numpy(np.array(Image.open(buffer))).to(image.dtype) / 255
    return pixels[None] if len(image) == 1 else pixels.permute(2, 0, 1)


def _resize(image: torch.Tensor, size: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
    size = (max(size[0], 1), max(size[1], 1))
    return F.interpolate(image[None], size=size, mode=_choice(_RESIZE_MODES, generator))[0]


def _random_factor(ranges: Degradation, generator: torch.Generator | None) -> float:
    smallest, largest = ranges.factor
    bounds = ((1.0, largest), (smallest, 1.0), (1.0, 1.0))[_weighted(ranges.resize, generator)]
    return _uniform(bounds, generator)


def _uniform(bounds: Range, generator: torch.Generator | None) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(probability: float, generator: torch.Generator | None) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _weighted(probabilities, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(torch.tensor(probabilities), 1, generator=generator))


def _choice(options, generator: torch.Generator | None):
    return options[int(torch.randint(len(options), (), generator=generator))]
