"""transformers' common model tests for SHViT."""

import unittest

from hf_attn.modeling.shvit.configuration_shvit import SHViTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


class SHViTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "shvit"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_sdpa_can_dispatch_non_composite_models": "the default is eager, which is faster here; sdpa is for the asking",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return SHViTConfig.from_variant("tiny")


class SHViTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "shvit"

    def get_config(self):
        return SHViTConfig.from_variant("tiny", out_features=["stage1", "stage3"])
