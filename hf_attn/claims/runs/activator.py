"""Activator against a ViT of timm of the same width and depth, on digits and textures; the rule is that of `ImageContest`."""

from ...modeling.activator.configuration_activator import ActivatorConfig
from ...modeling.activator.modeling_activator import ActivatorForImageClassification
from ..contest import SIZE, ImageContest, vit


WIDTH, DEPTH = 64, 4


def activator(num_classes: int) -> ActivatorForImageClassification:
    return ActivatorForImageClassification(
        ActivatorConfig(
            image_size=SIZE,
            patch_size=8,
            num_channels=1,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=DEPTH,
            hidden_dropout_prob=0.0,
            num_labels=num_classes,
        )
    )


_contest = ImageContest(
    {"Activator": activator, "ViT of timm": lambda classes: vit(classes, WIDTH, DEPTH)}, same_cost=False
)
measure, conclude, draw = _contest.measure, _contest.conclude, _contest.draw
