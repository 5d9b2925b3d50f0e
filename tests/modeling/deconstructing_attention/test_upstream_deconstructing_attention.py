"""transformers' common model tests for deconstructed attention."""

import unittest

from hf_attn.modeling.deconstructing_attention.configuration_deconstructing_attention import DeconstructedConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class DeconstructedUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "deconstructing_attention"

    def get_config(self):
        return DeconstructedConfig(**DeconstructedConfig.tiny)
