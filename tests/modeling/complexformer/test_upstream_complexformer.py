"""transformers' common model tests for ComplexFormer."""

import unittest

from hf_attn.modeling.complexformer.configuration_complexformer import ComplexFormerConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class ComplexFormerUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "complexformer"

    def get_config(self):
        return ComplexFormerConfig.from_variant("tiny")
