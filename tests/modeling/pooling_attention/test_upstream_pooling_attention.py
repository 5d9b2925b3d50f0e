"""transformers' common model tests for the embedder."""

import unittest

from hf_attn.modeling.pooling_attention.configuration_pooling_attention import PoolingAttentionConfig
from tests.batteries.upstream import UpstreamTextTests


class PoolingAttentionUpstreamTest(UpstreamTextTests, unittest.TestCase):
    model_type = "pooling_attention"

    def get_config(self):
        return PoolingAttentionConfig.from_variant("tiny")


class LastTokenUpstreamTest(PoolingAttentionUpstreamTest):
    is_further_configuration = True

    def get_config(self):
        return PoolingAttentionConfig.from_variant("tiny", design=2)
