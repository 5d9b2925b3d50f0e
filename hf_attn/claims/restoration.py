"""Small networks that enlarge photographs twice, against the Swin2SR of transformers.

All learn from the left three quarters of six photographs what bicubic enlargement leaves out, from weights with which they add nothing to
it. The right quarters of four of them are the test, those of the others the validation.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
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
from .drawing import bars
from .result import Conclusion, Figure, agreement
from .training import batches, operations, optimise, tuned


SCALE, WINDOW = 2, 8
#: learning rates to choose from; those of other claims are too high for either side to learn anything
RATES = (3e-4, 1e-3)
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
def tiles(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low resolutions `(count, 3, TILE, TILE)` and photographs of `test` or `validation`, or all if there are fewer."""
    sources, side = load_photographs(), SCALE * TILE
    high = []
    for image in Images(sources[:4] if part == "test" else sources[4:], "right"):
        height, width = (length - length % side for length in image.shape[-2:])
        rows = image[:, :height, :width].float().div(255).unfold(1, side, side).unfold(2, side, side)
        high += rows.permute(1, 2, 0, 3, 4).flatten(0, 1)
    high = high[:count]
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
    make_network: Callable[[], PreTrainedModel], steps: int, count: int, seed: int, rate: float
) -> tuple[Enlarger, dict[str, float]]:
    """Train on the mean absolute error.

    Returns:
        The model; its error on the first `count` tiles of the validation part (`validation`), and its PSNR on those of the test part in
        dB (`psnr`).
    """
    torch.manual_seed(seed)
    model, (low, high) = Enlarger(make_network()), patches(min(NUM_PATCHES, steps * BATCH_SIZE))
    order = batches(len(low), BATCH_SIZE, seed)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return F.l1_loss(model(low[chosen]), high[chosen])

    optimise(model, loss, steps, rate)
    low, high = tiles("validation", count)
    error = F.l1_loss(enlarge(model, low), high).item()
    return model, {"validation": error, "psnr": mean_psnr(model, *tiles("test", count))}


@torch.no_grad()
def enlarge(model: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in low.split(8)])


def mean_psnr(model: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor, high: torch.Tensor) -> float:
    """Mean over images, on the Y channel without a border of the scale, in dB."""
    pairs = zip(to_uint8(enlarge(model, low)), to_uint8(high), strict=True)
    return fmean(psnr(ours, theirs, crop_border=SCALE) for ours, theirs in pairs)


class EnlargementContest:
    """`measure` of the claim that a network enlarges better than a Swin2SR, and does something else more than it, and the verdict.

    Shown in small if for every seed both are more; contradicted if the seeds agree that either is less; otherwise not shown here.

    Args:
        own: name of the paper's network.
        make_own: makes it.
        make_peer: makes the Swin2SR.
        sizes: the least and the largest share that the paper's network may have of the peer's parameters.
        look: a trained model and low resolutions -> further results.
        steps: of a training.
    """

    peer = "Swin2SR of transformers"

    def __init__(
        self,
        own: str,
        make_own: Callable[[], PreTrainedModel],
        make_peer: Callable[[], PreTrainedModel],
        sizes: tuple[float, float],
        look: Callable[[Enlarger, torch.Tensor], dict[str, Any]],
        steps: int = 400,
    ):
        self.own, self.sides = own, {own: make_own, self.peer: make_peer}
        self.sizes, self.look, self.steps = sizes, look, steps

    def measure(self, work) -> dict[str, Any]:
        """Parameters, operations for a tile, results of each side for the seeds, and PSNR of bicubic enlargement."""
        networks = {name: make() for name, make in self.sides.items()}
        parameters = {name: network.num_parameters() for name, network in networks.items()}
        if not self.sizes[0] <= parameters[self.own] / parameters[self.peer] <= self.sizes[1]:
            raise RuntimeError(f"The numbers of parameters do not fit: {parameters}.")
        picture = torch.zeros(1, 3, TILE, TILE)
        steps, count = (2, 1) if work.miniature else (self.steps, 100)
        return {
            "parameters": parameters,
            "operations": {name: operations(network, picture) for name, network in networks.items()},
            "bicubic": mean_psnr(lambda low: bicubic_resize(low, SCALE), *tiles("test", count)),
            "runs": {
                name: tuned(work, f"side{index}", partial(self.run, make, steps, count), RATES)
                for index, (name, make) in enumerate(self.sides.items())
            },
        }

    def run(self, make_network, steps: int, count: int, seed: int, rate: float) -> dict[str, Any]:
        model, result = train_enlarger(make_network, steps, count, seed, rate)
        return {**result, **self.look(model, tiles("test", count)[0])}

    def values(self, data: dict[str, Any], name: str) -> list[list[Any]]:
        """Results of the paper's network for the seeds, and of the peer."""
        return [[run[name] for run in data["runs"][side]] for side in self.sides]

    def conclude(
        self, data: dict[str, Any], what: str, unit: str, own: Sequence[float], others: Sequence[float]
    ) -> Conclusion:
        """The verdict by the rule of the class, where `what` else the network does more is measured in `unit`."""
        quality = self.values(data, "psnr")
        counts = [[data[name][side] for side in self.sides] for name in ("parameters", "operations")]
        figures = (
            Figure.of("PSNR, enlarged twice", "dB", quality[0], self.peer, quality[1]),
            Figure.of(what, unit, own, self.peer, others),
            Figure.of("PSNR of bicubic enlargement", "dB", data["bicubic"]),
            Figure.of("parameters", "thousand", counts[0][0] / 1e3, self.peer, counts[0][1] / 1e3),
            Figure.of(
                f"operations for {TILE} x {TILE} pixels", "million", counts[1][0] / 1e6, self.peer, counts[1][1] / 1e6
            ),
        )
        orders = agreement(*quality), agreement(own, others)
        words = {1: "higher", 0: "not clearly different", -1: "lower"}
        verdict = "not shown here"
        if min(orders) > 0:
            verdict = "shown in small"
        elif min(orders) < 0:
            verdict = "contradicted here"
        share = counts[0][0] / counts[0][1]
        why = (
            f"With {share:.0%} of the parameters and equal training its PSNR is {words[orders[0]]}, and the {what} is "
            f"{words[orders[1]]}."
        )
        return Conclusion(figures, verdict, why)

    def bars(self, axes, data: dict[str, Any]) -> None:
        """Draw the PSNR of both."""
        qualities = zip(map(short, self.sides), self.values(data, "psnr"), strict=True)
        bars(axes, dict(qualities), "PSNR in dB", "held-out images")


def short(side: str) -> str:
    return side.split()[0]
