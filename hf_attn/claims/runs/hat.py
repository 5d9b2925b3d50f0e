"""HAT against a Swin2SR of transformers of the same size: PSNR of enlarged photographs, and from how far it gathers its pixels.

The range is that of local attribution maps (arXiv 2011.11046), integrated gradients of the edges in the middle of a picture along a path of
blurred pictures: the diffusion index is 100 (1 - G), with the Gini coefficient G of the map, 0 if all is from one pixel and 100 if all
pixels count alike. Shown in small if for every seed both are higher than Swin2SR's; contradicted if the seeds agree that either is lower;
otherwise not shown here. The sizes may differ by 3 % in parameters.
"""

from functools import partial
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...modeling.hat.configuration_hat import HATConfig
from ...modeling.hat.modeling_hat import HATForImageSuperResolution
from ...restoration.degradation import filter_image, gaussian_kernel
from ..drawing import bars
from ..restoration import SCALE, TILE, WINDOW, bicubic_psnr, size_of, swin2sr, tiles, train_enlarger
from ..result import Conclusion, Figure, agreement
from ..training import tuned


#: side of the square in the middle of the output whose edges are attributed, largest blur of the path in pixels
SQUARE, BLUR, BLUR_SIDE = 16, 1.2, 9
#: pixels of a cell of the map that is kept for the picture
CELL = 2


def hat() -> HATForImageSuperResolution:
    return HATForImageSuperResolution(
        HATConfig(
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=WINDOW,
            compress_ratio=3,
            squeeze_factor=6,
            upscale=SCALE,
            drop_path_rate=0.0,
        )
    )


def peer() -> PreTrainedModel:
    return swin2sr(width=24, depths=[3, 3], heads=2)


OWN, PEER = "HAT", "Swin2SR of transformers"
SIDES = {OWN: hat, PEER: peer}


def measure(work) -> dict:
    sizes = {name: size_of(make) for name, make in SIDES.items()}
    ratio = sizes[PEER]["parameters"] / sizes[OWN]["parameters"]
    if not 0.97 <= ratio <= 1.03:
        raise RuntimeError(f"The parameters differ too much: {sizes}.")
    steps, pictures = (2, 1) if work.miniature else (400, 8)
    runs = {
        name: tuned(work, f"side{index}", partial(train_and_attribute, make, steps, pictures))
        for index, (name, make) in enumerate(SIDES.items())
    }
    return {"sizes": sizes, "runs": runs, "bicubic": bicubic_psnr()}


def train_and_attribute(make_network, steps: int, pictures: int, seed: int, rate: float) -> dict:
    model, result = train_enlarger(make_network, steps, seed, rate)
    low = tiles("test")[0]
    maps = [attribution(model, low[index]) for index in range(0, len(low), len(low) // pictures)[:pictures]]
    shares = torch.stack([found / found.sum() for found in maps]).mean(0)
    cells = F.avg_pool2d(shares[None], CELL)[0] * CELL**2
    return {
        **result,
        "diffusion": fmean(diffusion_index(found) for found in maps),
        "map": [[float(f"{share:.3g}") for share in row] for row in cells.tolist()],
    }


def attribution(model: nn.Module, image: torch.Tensor, steps: int = 8) -> torch.Tensor:
    """How much each pixel `(height, width)` of a low resolution `(3, height, width)` counts for the edges in the middle of the output."""
    blurs = [BLUR * (1 - step / steps) for step in range(steps)]
    path = [filter_image(image, gaussian_kernel(BLUR_SIDE, (blur, blur))) for blur in blurs] + [image]
    points = torch.stack(path)
    inputs = points[1:].clone().requires_grad_()
    output = model(inputs)
    start = output.shape[-1] // 2 - SQUARE // 2
    square = output[..., start : start + SQUARE, start : start + SQUARE]
    edges = square.diff(dim=-1).abs().sum() + square.diff(dim=-2).abs().sum()
    (gradient,) = torch.autograd.grad(edges, inputs)
    return (gradient * points.diff(dim=0)).sum(0).abs().sum(0)


def diffusion_index(attributions: torch.Tensor) -> float:
    """100 (1 - G), with the Gini coefficient G."""
    values = attributions.double().flatten().sort().values
    count = len(values)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    gini = (2 * (ranks * values).sum() / values.sum() - (count + 1)) / count
    return 100 * (1 - gini.item())


def _values(data: dict, side: str, name: str) -> list[float]:
    return [run[name] for run in data["runs"][side]]


def conclude(data: dict) -> Conclusion:
    quality, reach = ([_values(data, side, name) for side in SIDES] for name in ("psnr", "diffusion"))
    sizes = data["sizes"]
    figures = (
        Figure.of("PSNR, enlarged twice", "dB", quality[0], PEER, quality[1]),
        Figure.of("diffusion index of the local attribution", "", reach[0], PEER, reach[1]),
        Figure.of("PSNR of bicubic enlargement", "dB", data["bicubic"]),
        Figure.of("parameters", "thousand", sizes[OWN]["parameters"] / 1e3, PEER, sizes[PEER]["parameters"] / 1e3),
        Figure.of(
            f"operations for {TILE} x {TILE} pixels",
            "million",
            sizes[OWN]["operations"] / 1e6,
            PEER,
            sizes[PEER]["operations"] / 1e6,
        ),
    )
    orders = agreement(*quality), agreement(*reach)
    words = {1: "higher", 0: "not clearly different", -1: "lower"}
    verdict = "not shown here"
    if min(orders) > 0:
        verdict = "shown in small"
    elif min(orders) < 0:
        verdict = "contradicted here"
    why = f"At equal size and training its PSNR is {words[orders[0]]} and its diffusion index {words[orders[1]]}."
    return Conclusion(figures, verdict, why)


def draw(data: dict, figure) -> None:
    axes = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    means = {}
    for side in SIDES:
        maps = torch.tensor(_values(data, side, "map"))
        means[side] = maps.mean(0).clamp_min(1e-9).log10()
    highest = max(found.max().item() for found in means.values())
    for panel, (side, found) in zip(axes, means.items(), strict=False):
        panel.imshow(found, cmap="inferno", vmin=highest - 4, vmax=highest)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(f"{side.split()[0]}: pixels used", fontsize=10)
        reach = fmean(_values(data, side, "diffusion"))
        panel.set_xlabel(f"diffusion index {reach:.1f}")
    bars(axes[2], {side.split()[0]: _values(data, side, "psnr") for side in SIDES}, "PSNR in dB", "held-back pictures")
