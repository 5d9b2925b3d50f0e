"""transformers' common model tests for RMT."""

import unittest

from hf_attn.modeling.rmt.configuration_rmt import RMTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


def tiny_config(**overrides) -> RMTConfig:
    fields = {
        "image_size": 64,
        "hidden_sizes": [8, 16, 16, 24],
        "depths": [1, 1, 2, 1],
        "num_attention_heads": [1, 2, 2, 3],
        "mlp_ratios": [2, 2, 2, 2],
        "axis_decomposed": [False, True, True, False],
        "layerscales": [False, False, True, True],
        "layer_scale_init_value": 0.5,
        "projection_dim": 20,
        "out_features": ["stage1", "stage3"],
    }
    return RMTConfig(**{**fields, **overrides})


class RMTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "rmt"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return tiny_config()


class RMTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "rmt"

    def get_config(self):
        return tiny_config()
