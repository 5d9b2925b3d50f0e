"""transformers' common model tests for deconstructed attention."""

import unittest

from hf_attn.modeling.deconstructing_attention.configuration_deconstructing_attention import DeconstructedConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class DeconstructedUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "deconstructing_attention"
    skipped = {
        "test_generation_returns_requested_outputs": "a state of constant size has no weights of earlier tokens to return",
        "test_packed_sequences_under_a_4d_mask": "a recurrence serves no mask for pairs of tokens, and says so",
        "test_prompt_lookup_matches_greedy": "a state of constant size cannot forget rejected tokens, and says so",
    }

    def get_config(self):
        return DeconstructedConfig.from_variant("tiny")
