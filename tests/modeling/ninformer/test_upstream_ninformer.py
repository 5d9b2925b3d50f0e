"""transformers' common model tests for NiNformer."""

import unittest

from hf_attn.modeling.ninformer.configuration_ninformer import NiNformerConfig
from tests.batteries.upstream import UpstreamImageTests


class NiNformerUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "ninformer"
    has_attentions = False
    facts = {"seq_length": 16}

    def get_config(self):
        return NiNformerConfig.from_variant("tiny")
