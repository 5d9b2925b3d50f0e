"""transformers' common model tests for NiNformer."""

import unittest

from hf_attn.modeling.ninformer.configuration_ninformer import NiNformerConfig
from tests.batteries.upstream import UpstreamImageTests


def tiny_config(**overrides) -> NiNformerConfig:
    fields = {
        "image_size": 16,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.1,
    }
    return NiNformerConfig(**{**fields, **overrides})


class NiNformerUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "ninformer"
    has_attentions = False
    facts = {"seq_length": 16}

    def get_config(self):
        return tiny_config()
