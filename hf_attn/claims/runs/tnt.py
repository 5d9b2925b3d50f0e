"""TNT against a ViT of timm with as many operations, on digits and textures; the rule is that of `ImageContest`."""

from ...modeling.tnt.configuration_tnt import TNTConfig
from ...modeling.tnt.modeling_tnt import TNTForImageClassification
from ..contest import SIZE, ImageContest, vit


def tnt(num_classes: int) -> TNTForImageClassification:
    return TNTForImageClassification(
        TNTConfig(
            image_size=SIZE,
            patch_size=8,
            num_channels=1,
            inner_stride=2,
            hidden_size=64,
            inner_hidden_size=12,
            num_hidden_layers=4,
            num_attention_heads=4,
            inner_num_attention_heads=2,
            mlp_ratio=2,
            initializer_range=0.1,
            num_labels=num_classes,
        )
    )


_contest = ImageContest({"TNT": tnt, "ViT of timm": lambda classes: vit(classes, width=64, depth=8)})
measure, conclude, draw = _contest.measure, _contest.conclude, _contest.draw
