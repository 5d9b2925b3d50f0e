"""Small networks that enlarge photographs twice, against the Swin2SR of transformers.

All learn from the left three quarters of six photographs what bicubic enlargement leaves out, from weights with which they add nothing to
it. The right quarters of four of them are the test, those of the others the validation.
"""

from collections.abc import Callable
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Swin2SRConfig, Swin2SRForImageSuperResolution

from ..architectures.restoration.modeling import RGB_MEAN
from ..examples.photographs import load_photographs
from ..restoration.metrics import psnr, to_uint8
from ..restoration.pairs import Images, Patches, low_resolution
from ..restoration.resize import bicubic_resize
from .training import batches, operations, optimise


SCALE, WINDOW = 2, 8
#: sides in low resolution
PATCH, TILE = 16, 48
NUM_PATCHES, BATCH_SIZE = 1200, 4


@cache
def patches(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is learned: low resolutions `(count, 3, PATCH, PATCH)` and photographs, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = Patches(Images(load_photographs(), "left"), SCALE, PATCH)
        found = [source[index % len(source)] for index in range(count)]
    return tuple(torch.stack([pair[name] for pair in found]) for name in ("pixel_values", "labels"))


@cache
def tiles(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Low resolutions `(count, 3, TILE, TILE)` and photographs of `test` or `validation`."""
    sources, side = load_photographs(), SCALE * TILE
    high = []
    for image in Images(sources[:4] if part == "test" else sources[4:], "right"):
        height, width = (length - length % side for length in image.shape[-2:])
        rows = image[:, :height, :width].float().div(255).unfold(1, side, side).unfold(2, side, side)
        high += rows.permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.stack([low_resolution(image, SCALE, "bicubic") for image in high]), torch.stack(high)


class Enlarger(nn.Module):
    """Bicubic enlargement, plus what a network adds to it: nothing before training."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(3, 1, 1))
        last = next(module for name, module in network.named_modules() if name.endswith("final_convolution"))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, height, width)` in [0, 1] -> twice the size, not clamped."""
        return bicubic_resize(pixel_values, SCALE) + self.network(pixel_values).reconstruction - self.mean


def swin2sr(width: int, depths: list[int], heads: int) -> Swin2SRForImageSuperResolution:
    """The peer. Its convolutions begin as those of the others, not as in transformers, where almost nothing passes at first."""
    model = Swin2SRForImageSuperResolution(
        Swin2SRConfig(
            embed_dim=width,
            depths=depths,
            num_heads=[heads] * len(depths),
            window_size=WINDOW,
            upscale=SCALE,
            drop_path_rate=0.0,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


def train_enlarger(
    make_network: Callable[[], PreTrainedModel], steps: int, seed: int, rate: float
) -> tuple[Enlarger, dict[str, float]]:
    """Train on the mean absolute error.

    Returns:
        The model; its error on the validation part (`validation`), and its PSNR on the test part in dB (`psnr`).
    """
    torch.manual_seed(seed)
    model, (low, high) = Enlarger(make_network()), patches(min(NUM_PATCHES, steps * BATCH_SIZE))
    order = batches(len(low), BATCH_SIZE, seed)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return F.l1_loss(model(low[chosen]), high[chosen])

    optimise(model, loss, steps, rate)
    low, high = tiles("validation")
    return model, {"validation": F.l1_loss(enlarge(model, low), high).item(), "psnr": mean_psnr(model, *tiles("test"))}


@torch.no_grad()
def enlarge(model: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in low.split(8)])


def mean_psnr(model: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor, high: torch.Tensor) -> float:
    """Mean over images, on the Y channel without a border of the scale, in dB."""
    pairs = zip(to_uint8(enlarge(model, low)), to_uint8(high), strict=True)
    return fmean(psnr(ours, theirs, crop_border=SCALE) for ours, theirs in pairs)


def bicubic_psnr() -> float:
    return mean_psnr(lambda low: bicubic_resize(low, SCALE), *tiles("test"))


def size_of(make_network: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    """Parameters, and operations for a tile."""
    network = make_network()
    return {
        "parameters": network.num_parameters(),
        "operations": operations(network, torch.zeros(1, 3, TILE, TILE)),
    }
