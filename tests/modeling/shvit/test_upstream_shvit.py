"""transformers' common model tests for SHViT."""

import unittest

from hf_attn.modeling.shvit.configuration_shvit import SHViTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


def tiny_config(**overrides) -> SHViTConfig:
    fields = {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 2],
        "partial_dims": [4, 8, 8],
        "qk_dims": [4, 4, 4],
        "out_features": ["stage1", "stage3"],
    }
    return SHViTConfig(**{**fields, **overrides})


class SHViTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "shvit"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_sdpa_can_dispatch_non_composite_models": "the default is eager, which is faster here; sdpa is for the asking",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return tiny_config()


class SHViTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "shvit"

    def get_config(self):
        return tiny_config()
