"""What the tests of the image-restoration families share."""

import torch

from tests.batteries.upstream import UpstreamImageTests


class UpstreamRestorationTests(UpstreamImageTests):
    """The battery for image restoration: labels are images.

    Attentions are in windows and of several kinds, which upstream's shapes do not describe; see `test_layers.py`.
    """

    has_attentions = False
    facts = {"seq_length": 64}

    def get_labels(self, model_class, inputs):
        if "ForImageSuperResolution" not in model_class.__name__:
            return {}
        size = [self.get_config().upscale * side for side in inputs["pixel_values"].shape[2:]]
        # Upstream asks for them twice and compares the losses.
        generator = torch.Generator().manual_seed(0)
        return {"labels": torch.rand(*inputs["pixel_values"].shape[:2], *size, generator=generator)}
