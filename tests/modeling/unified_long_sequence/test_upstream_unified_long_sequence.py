"""transformers' common model tests for the models with a selectable token mixer."""

import unittest

from hf_attn.modeling.unified_long_sequence.configuration_unified_long_sequence import TokenMixerConfig
from tests.batteries.upstream import UpstreamCausalLMTests, UpstreamTextTests


class TokenMixerUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "token_mixer"
    has_attentions = False
    skipped = {
        "test_model_rope_scaling_from_config*": "positions are learned: the model has no rotary embedding",
        "test_packed_sequences_under_a_4d_mask": "mixers take no mask of pairs, and say so",
    }

    def get_config(self):
        return TokenMixerConfig.from_variant("tiny")


class BidirectionalTokenMixerUpstreamTest(UpstreamTextTests, unittest.TestCase):
    """A mixer without a causal form and with weights for each position, in a classifier."""

    model_type = "token_mixer"
    is_further_configuration = True
    has_attentions = False

    def setUp(self):
        super().setUp()
        self.all_model_classes = tuple(c for c in self.all_model_classes if not c.__name__.endswith("ForCausalLM"))

    def get_config(self):
        return TokenMixerConfig.from_variant("tiny", mixer="linformer", causal=False)
