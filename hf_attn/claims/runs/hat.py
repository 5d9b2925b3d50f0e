"""HAT against a Swin2SR of transformers of the same size: PSNR of enlarged photographs, and from how far it gathers its pixels.

The range is that of local attribution maps (arXiv 2011.11046), integrated gradients of the edges in the middle of a picture along a path of
blurred pictures: the diffusion index is 100 (1 - G), with the Gini coefficient G of the map, 0 if all is from one pixel and 100 if all
pixels count alike. The rule is that of `EnlargementContest`, with this index as what else is to be higher; the numbers of parameters may
differ by 3 %.
"""

from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...modeling.hat.configuration_hat import HATConfig
from ...modeling.hat.modeling_hat import HATForImageSuperResolution
from ...restoration.degradation import filter_image, gaussian_kernel
from ..restoration import SCALE, WINDOW, EnlargementContest, short, swin2sr
from ..result import Conclusion


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


def attributions(model: nn.Module, low: torch.Tensor) -> dict:
    """Mean over every other low resolution: the diffusion index, and the map as shares of cells of `CELL` pixels."""
    maps = [attribution(model, image) for image in low[::2]]
    shares = torch.stack([found / found.sum() for found in maps]).mean(0)
    cells = F.avg_pool2d(shares[None], CELL)[0] * CELL**2
    return {
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


_contest = EnlargementContest("HAT", hat, peer, sizes=(0.97, 1.03), look=attributions)
measure = _contest.measure


def conclude(data: dict) -> Conclusion:
    return _contest.conclude(data, "diffusion index of the local attribution", "", *_contest.values(data, "diffusion"))


def draw(data: dict, figure) -> None:
    axes = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    means = [torch.tensor(maps).mean(0).clamp_min(1e-9).log10() for maps in _contest.values(data, "map")]
    highest = max(found.max().item() for found in means)
    for panel, side, found, reach in zip(
        axes, _contest.sides, means, _contest.values(data, "diffusion"), strict=False
    ):
        panel.imshow(found, cmap="inferno", vmin=highest - 4, vmax=highest)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(f"{short(side)}: pixels used", fontsize=10)
        panel.set_xlabel(f"diffusion index {fmean(reach):.1f}")
    _contest.bars(axes[2], data)
