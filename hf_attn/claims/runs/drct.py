"""DRCT against a Swin2SR of transformers that is a little larger: PSNR of enlarged photographs, and intensity of the features by depth.

The intensity is the mean absolute value of the features behind each group, on held-out photographs. It is kept up if the last group has a
large share of the highest one. The rule is that of `EnlargementContest`, with this share as what else is to be higher; DRCT has 90 to 99 % of
the parameters of the Swin2SR.
"""

from statistics import fmean

import torch
from transformers import PreTrainedModel

from ...modeling.drct.configuration_drct import DRCTConfig
from ...modeling.drct.modeling_drct import DRCTForImageSuperResolution
from ..drawing import COLORS
from ..restoration import SCALE, WINDOW, EnlargementContest, Enlarger, short, swin2sr
from ..result import Conclusion


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


@torch.no_grad()
def intensities(model: Enlarger, low: torch.Tensor) -> dict[str, list[float]]:
    """Mean absolute value of the features behind each group."""
    parts = [model.network(part, output_hidden_states=True).hidden_states[1 : GROUPS + 1] for part in low.split(8)]
    return {"intensities": [torch.cat(states).abs().mean().item() for states in zip(*parts, strict=True)]}


_contest = EnlargementContest("DRCT", drct, peer, sizes=(0.9, 0.99), look=intensities)
measure = _contest.measure


def _shares(data: dict) -> list[list[list[float]]]:
    """Intensities in percent of the highest one, for each side and seed."""
    return [
        [[100 * intensity / max(run) for intensity in run] for run in runs]
        for runs in _contest.values(data, "intensities")
    ]


def conclude(data: dict) -> Conclusion:
    own, others = ([run[-1] for run in runs] for runs in _shares(data))
    return _contest.conclude(data, "intensity behind the last group as a share of the highest", "%", own, others)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    groups = range(1, GROUPS + 1)
    for side, runs, color in zip(_contest.sides, _shares(data), COLORS, strict=False):
        for shares in runs:
            left.plot(groups, shares, "o-", color=color, alpha=0.3)
        means = [fmean(column) for column in zip(*runs, strict=True)]
        left.plot(groups, means, color=color, linewidth=3, label=short(side))
    left.set_xticks(groups)
    left.set(xlabel="group", ylabel="% of the highest", title="intensity of the features", ylim=(0, 105))
    left.legend(fontsize=8)
    _contest.bars(right, data)
