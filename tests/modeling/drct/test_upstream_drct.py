"""transformers' common model tests for DRCT."""

import unittest

from hf_attn.modeling.drct.configuration_drct import DRCTConfig
from tests.batteries.restoration import UpstreamRestorationTests


class DRCTUpstreamTest(UpstreamRestorationTests, unittest.TestCase):
    model_type = "drct"

    def get_config(self):
        return DRCTConfig(
            embed_dim=16,
            depths=[6, 6],
            num_heads=[2, 2],
            window_size=4,
            growth_channels=4,
            image_size=8,
            upscale=3,
        )
