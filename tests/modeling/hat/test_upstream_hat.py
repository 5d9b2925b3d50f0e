"""transformers' common model tests for HAT."""

import unittest

from hf_attn.modeling.hat.configuration_hat import HATConfig
from tests.batteries.restoration import UpstreamRestorationTests


class HATUpstreamTest(UpstreamRestorationTests, unittest.TestCase):
    model_type = "hat"

    def get_config(self):
        return HATConfig.from_variant("tiny")


class HATAbsoluteEmbeddingsUpstreamTest(UpstreamRestorationTests, unittest.TestCase):
    """The options that no published model uses."""

    model_type = "hat"
    is_further_configuration = True

    def get_config(self):
        return HATConfig(
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=4,
            compress_ratio=4,
            squeeze_factor=4,
            image_size=8,
            upscale=1,
            use_absolute_embeddings=True,
            patch_norm=False,
            qkv_bias=False,
            resi_connection="identity",
            loss_type="l2",
        )
