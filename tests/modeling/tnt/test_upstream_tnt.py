"""transformers' common model tests for TNT."""

import unittest

from hf_attn.modeling.tnt.configuration_tnt import TNTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


def tiny_config(**overrides) -> TNTConfig:
    fields = {
        "image_size": 32,
        "patch_size": 8,
        "inner_stride": 4,
        "hidden_size": 32,
        "inner_hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "inner_num_attention_heads": 2,
        "mlp_ratio": 2,
        "out_features": ["stem", "stage2"],
    }
    return TNTConfig(**{**fields, **overrides})


class TNTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "tnt"
    facts = {"seq_length": 17}

    def get_config(self):
        return tiny_config()


class TNTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "tnt"

    def get_config(self):
        return tiny_config()
