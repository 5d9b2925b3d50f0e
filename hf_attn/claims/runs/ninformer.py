"""NiNformer against MLP-Mixer and ViT of timm with as many operations, on digits and textures; the rule is that of `ImageContest`."""

from torch import nn

from ...modeling.ninformer.configuration_ninformer import NiNformerConfig
from ...modeling.ninformer.modeling_ninformer import NiNformerForImageClassification
from ..contest import SIZE, ImageContest, vit


def ninformer(num_classes: int) -> NiNformerForImageClassification:
    return NiNformerForImageClassification(
        NiNformerConfig(
            image_size=SIZE,
            patch_size=8,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            hidden_dropout_prob=0.0,
            num_labels=num_classes,
        )
    )


def mixer(num_classes: int) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes, SIZE, in_chans=1, patch_size=8, num_blocks=6, embed_dim=64, mlp_ratio=(1.0, 2.0))


_contest = ImageContest(
    {"NiNformer": ninformer, "MLP-Mixer of timm": mixer, "ViT of timm": lambda classes: vit(classes, mlp_ratio=2.5)}
)
measure, conclude, draw = _contest.measure, _contest.conclude, _contest.draw
