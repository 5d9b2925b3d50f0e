"""transformers' common model tests for RMT."""

import unittest

from hf_attn.modeling.rmt.configuration_rmt import RMTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


class RMTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "rmt"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return RMTConfig.from_variant("tiny")


class RMTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "rmt"

    def get_config(self):
        return RMTConfig.from_variant("tiny", out_features=["stage1", "stage3"])
