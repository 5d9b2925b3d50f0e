"""transformers' common model tests for the auto-encoder of attention patterns."""

import unittest

from hf_attn.modeling.vit_analytics.configuration_vit_analytics import VitPatternAutoencoderConfig
from tests.batteries.upstream import UpstreamModelTests, common


class VitPatternAutoencoderUpstreamTest(UpstreamModelTests, unittest.TestCase):
    model_type = "vit_pattern_autoencoder"
    has_attentions = False
    skipped = {
        "test_hidden_states_output": "the model has no sequence of hidden states",
        "test_retain_grad_hidden_states_attentions": "the model has no sequence of hidden states",
        "test_resize_tokens_embeddings": "there are no token embeddings",
        "test_model_get_set_embeddings": "there are no token embeddings",
    }

    def get_config(self):
        return VitPatternAutoencoderConfig.from_variant("tiny")

    def get_inputs(self, config):
        patches = config.num_patches
        return {"maps": common.floats_tensor((self.batch_size, patches, patches)).softmax(-1)}
