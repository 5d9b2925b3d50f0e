"""transformers' common model tests for BiFormer."""

import unittest

from hf_attn.modeling.biformer.configuration_biformer import BiFormerConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


def tiny_config(**overrides) -> BiFormerConfig:
    """Two stages with routing attention, then full attention; feature maps of 16, 8 and 4 positions along a side."""
    fields = {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 1],
        "mlp_ratios": [2, 2, 2],
        "n_win": 2,
        "topks": [1, 3, -2],
        "head_dim": 8,
        "out_features": ["stage1", "stage3"],
    }
    return BiFormerConfig(**{**fields, **overrides})


class BiFormerUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "biformer"
    facts = {"num_hidden_layers": 1}
    skipped = {
        "test_hidden_states_output": "feature maps are (batch, channels, height, width); a test of ours looks at them",
        "test_attention_outputs": "the maps of each stage have a size of their own; a test of ours looks at them",
    }

    def get_config(self):
        return tiny_config()


class BiFormerBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "biformer"

    def get_config(self):
        return tiny_config()
