"""RMT against itself without the decay and against a Swin of timm with as many operations, on digits and textures.

Without the decay RMT attends to all positions alike, with the same layers and weights. The rule is that of `ImageContest`.
"""

from ...modeling.rmt.configuration_rmt import RMTConfig
from ...modeling.rmt.modeling_rmt import RMTForImageClassification
from ..contest import SIZE, ImageContest, swin


#: an exponent so large that the decay rounds to 1 in float32
NO_DECAY = 30.0


def rmt(num_classes: int, **fields) -> RMTForImageClassification:
    return RMTForImageClassification(
        RMTConfig(
            image_size=SIZE,
            num_channels=1,
            hidden_sizes=[24, 48],
            depths=[1, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            axis_decomposed=[False, False],
            layerscales=[False, False],
            projection_dim=64,
            num_labels=num_classes,
            **{"decay_initial_values": [2.0, 2.0], "decay_ranges": [4, 4], **fields},
        )
    )


def without_decay(num_classes: int) -> RMTForImageClassification:
    return rmt(num_classes, decay_initial_values=[NO_DECAY, NO_DECAY], decay_ranges=[0, 0])


_contest = ImageContest({"RMT": rmt, "RMT without decay": without_decay, "Swin of timm": swin}, steps=600)
measure, conclude, draw = _contest.measure, _contest.conclude, _contest.draw
