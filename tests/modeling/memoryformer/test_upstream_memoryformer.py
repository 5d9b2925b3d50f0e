"""transformers' common model tests for MemoryFormer."""

import unittest

from hf_attn.modeling.memoryformer.configuration_memoryformer import MemoryFormerConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class MemoryFormerUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "memoryformer"

    def get_config(self):
        return MemoryFormerConfig.from_variant("tiny")
