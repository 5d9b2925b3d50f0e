"""SHViT-S4 against MobileViTv2-1.0 of timm: the time of a call on one thread of a CPU, at 256 pixels, and the operations.

Shown in small if SHViT is at least twice as fast at both batch sizes, contradicted if it is slower at both. That the accuracies are comparable needs
trained weights and ImageNet, and is not measured; both models have random weights, BatchNorms folded where they can be.
"""

import torch
from torch import nn

from ...checkpoints.official import from_official
from ..drawing import bars
from ..result import Conclusion, Figure
from ..timing import least_cpu_seconds
from ..training import operations


PEER = "MobileViTv2-1.0 of timm"
BATCH_SIZES = (1, 16)


def measure(work) -> dict:
    size, repeats, batch_sizes = (64, 1, (1, 2)) if work.miniature else (256, 9, BATCH_SIZES)
    ours, theirs = make_models()
    picture = torch.zeros(1, 3, size, size)
    return {
        "operations": [operations(model, picture) / 1e6 for model in (ours, theirs)],
        "milliseconds": [
            [batch, *work.part(f"batch{batch}", milliseconds, ours, theirs, batch, size, repeats)]
            for batch in batch_sizes
        ],
    }


def make_models() -> tuple[nn.Module, nn.Module]:
    """SHViT-S4, folded, and its peer, with BatchNorm statistics as after training: the initial ones would fold into zeros."""
    import timm

    torch.manual_seed(0)
    models = [timm.create_model(name) for name in ("shvit_s4", "mobilevitv2_100")]
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return from_official("shvit", models[0].state_dict()).eval().fuse(), models[1].eval()


@torch.inference_mode()
def milliseconds(ours: nn.Module, theirs: nn.Module, batch: int, size: int, repeats: int) -> list[float]:
    """Minimum CPU times of a call on one thread, in milliseconds."""
    pictures = torch.randn(batch, 3, size, size)
    return [1e3 * found for found in least_cpu_seconds([lambda: ours(pictures), lambda: theirs(pictures)], repeats)]


def conclude(data: dict) -> Conclusion:
    figures = [
        Figure.of(f"time of a call, batch {batch}", "CPU ms", ours, PEER, theirs)
        for batch, ours, theirs in data["milliseconds"]
    ]
    figures.append(
        Figure.of("operations for a picture", "million", data["operations"][0], PEER, data["operations"][1])
    )
    ratios = [theirs / ours for _, ours, theirs in data["milliseconds"]]
    speed = " and ".join(
        f"by a factor of {ratio:.1f} at batch {row[0]}"
        for ratio, row in zip(ratios, data["milliseconds"], strict=True)
    )
    why = f"On one CPU thread it is faster {speed}; the accuracies are not measured."
    if max(ratios) < 1:
        return Conclusion(tuple(figures), "contradicted here", why)
    return Conclusion(tuple(figures), "shown in small" if min(ratios) >= 2 else "not shown here", why)


def draw(data: dict, figure) -> None:
    panels = figure.subplots(1, len(data["milliseconds"]) + 1)
    for axes, (batch, ours, theirs) in zip(panels, data["milliseconds"], strict=False):
        bars(axes, {"SHViT": [ours], "Mobile-\nViTv2": [theirs]}, "CPU ms", f"batch {batch}")
    ours, theirs = data["operations"]
    bars(panels[-1], {"SHViT": [ours], "Mobile-\nViTv2": [theirs]}, "million operations", "a picture")
