"""transformers' common model tests for BiFormer."""

import unittest

from hf_attn.modeling.biformer.configuration_biformer import BiFormerConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


class BiFormerUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "biformer"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return BiFormerConfig.from_variant("tiny")


class BiFormerBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "biformer"

    def get_config(self):
        return BiFormerConfig.from_variant("tiny", out_features=["stage1", "stage3"])
