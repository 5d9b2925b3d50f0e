"""Shared tests of the image-restoration families."""

import torch

from tests.batteries.upstream import UpstreamImageTests


class UpstreamRestorationTests(UpstreamImageTests):
    """The battery for image restoration: labels are images.

    There are several kinds of windowed attention, whose shapes upstream does not support; see `test_layers.py`.
    """

    has_attentions = False
    facts = {"seq_length": 64}

    def get_labels(self, model_class, inputs):
        if "ForImageSuperResolution" not in model_class.__name__:
            return {}
        size = [self.get_config().upscale * side for side in inputs["pixel_values"].shape[2:]]
        # Upstream requests the labels twice and compares the losses.
        generator = torch.Generator().manual_seed(0)
        return {"labels": torch.rand(*inputs["pixel_values"].shape[:2], *size, generator=generator)}
