"""DRCT against a Swin2SR of transformers that is a little larger: PSNR of enlarged photographs, and intensity of the features by depth.

The intensity is the mean absolute value of the features behind each group, on held-back photographs; it is kept up if the last group has
a large share of the highest one. Shown in small if DRCT has fewer parameters, and for every seed its PSNR and this share are higher than
Swin2SR's; contradicted if the seeds agree that either is lower; otherwise not shown here. The sizes may differ by 10 % in parameters.
"""

from functools import partial
from statistics import fmean

import torch
from transformers import PreTrainedModel

from ...modeling.drct.configuration_drct import DRCTConfig
from ...modeling.drct.modeling_drct import DRCTForImageSuperResolution
from ..drawing import COLORS, bars
from ..restoration import SCALE, WINDOW, bicubic_psnr, size_of, swin2sr, tiles, train_enlarger
from ..result import Conclusion, Figure, agreement
from ..training import tuned


GROUPS = 4


def drct() -> DRCTForImageSuperResolution:
    return DRCTForImageSuperResolution(
        DRCTConfig(
            embed_dim=16,
            growth_channels=8,
            depths=[5] * GROUPS,
            num_heads=[2] * GROUPS,
            window_size=WINDOW,
            upscale=SCALE,
            drop_path_rate=0.0,
        )
    )


def peer() -> PreTrainedModel:
    return swin2sr(width=24, depths=[6] * GROUPS, heads=2)


OWN, PEER = "DRCT", "Swin2SR of transformers"
SIDES = {OWN: drct, PEER: peer}


def measure(work) -> dict:
    sizes = {name: size_of(make) for name, make in SIDES.items()}
    ratio = sizes[OWN]["parameters"] / sizes[PEER]["parameters"]
    if not 0.9 <= ratio < 1:
        raise RuntimeError(f"The parameters differ too much: {sizes}.")
    steps = 2 if work.miniature else 400
    runs = {
        name: tuned(work, f"side{index}", partial(train_and_look, make, steps))
        for index, (name, make) in enumerate(SIDES.items())
    }
    return {"sizes": sizes, "runs": runs, "bicubic": bicubic_psnr()}


def train_and_look(make_network, steps: int, seed: int, rate: float) -> dict:
    model, result = train_enlarger(make_network, steps, seed, rate)
    return {**result, "intensities": intensities(model.network, tiles("test")[0])}


@torch.no_grad()
def intensities(network: PreTrainedModel, low: torch.Tensor) -> list[float]:
    """Mean absolute value of the features behind each group."""
    parts = [network(part, output_hidden_states=True).hidden_states[1 : GROUPS + 1] for part in low.split(8)]
    return [torch.cat(states).abs().mean().item() for states in zip(*parts, strict=True)]


def _shares(data: dict, side: str) -> list[list[float]]:
    """Intensities in percent of the highest one, for each seed."""
    return [
        [100 * intensity / max(run["intensities"]) for intensity in run["intensities"]] for run in data["runs"][side]
    ]


def conclude(data: dict) -> Conclusion:
    quality = [[run["psnr"] for run in data["runs"][side]] for side in SIDES]
    kept = [[shares[-1] for shares in _shares(data, side)] for side in SIDES]
    sizes = data["sizes"]
    figures = (
        Figure.of("PSNR, enlarged twice", "dB", quality[0], PEER, quality[1]),
        Figure.of(f"intensity behind the last of {GROUPS} groups, of the highest", "%", kept[0], PEER, kept[1]),
        Figure.of("PSNR of bicubic enlargement", "dB", data["bicubic"]),
        Figure.of("parameters", "thousand", sizes[OWN]["parameters"] / 1e3, PEER, sizes[PEER]["parameters"] / 1e3),
    )
    orders = agreement(*quality), agreement(*kept)
    words = {1: "higher", 0: "not clearly different", -1: "lower"}
    verdict = "not shown here"
    if min(orders) > 0:
        verdict = "shown in small"
    elif min(orders) < 0:
        verdict = "contradicted here"
    share = sizes[OWN]["parameters"] / sizes[PEER]["parameters"]
    why = (
        f"With {share:.0%} of the parameters and equal training its PSNR is {words[orders[0]]}, and what the last group keeps of the highest "
        f"intensity is {words[orders[1]]}."
    )
    return Conclusion(figures, verdict, why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for side, color in zip(SIDES, COLORS, strict=False):
        runs = _shares(data, side)
        for index, shares in enumerate(runs):
            left.plot(
                range(1, GROUPS + 1), shares, "o-", color=color, alpha=0.3, label=None if index else side.split()[0]
            )
        left.plot(
            range(1, GROUPS + 1), [fmean(column) for column in zip(*runs, strict=True)], color=color, linewidth=3
        )
    left.set_xticks(range(1, GROUPS + 1))
    left.set(xlabel="group", ylabel="% of the highest", title="intensity of the features", ylim=(0, 105))
    left.legend(fontsize=8)
    quality = {side.split()[0]: [run["psnr"] for run in data["runs"][side]] for side in SIDES}
    bars(right, quality, "PSNR in dB", "held-back pictures")
