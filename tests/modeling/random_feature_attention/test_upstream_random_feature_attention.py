"""transformers' common model tests for random-feature attention and the random-feature network."""

import unittest

import torch
from transformers.testing_utils import torch_device

from hf_attn.modeling.random_feature_attention.configuration_random_feature_attention import (
    RandomFeatureAttentionConfig,
    RandomFeatureMLPConfig,
)
from tests.batteries.upstream import UpstreamModelTests, common


class RandomFeatureTests(UpstreamModelTests):
    skipped = {
        "test_resize_*embeddings*": "there are no token embeddings",
        "test_model_get_set_embeddings": "there are no token embeddings",
        "test_inputs_embeds*": "inputs_embeds is the only input",
        "test_hidden_states_output": "one layer: there are no hidden states",
        "test_retain_grad_hidden_states_attentions": "one layer: there are no hidden states",
    }
    has_attentions = False

    def get_inputs(self, config):
        return {"inputs_embeds": common.floats_tensor((self.batch_size, config.num_keys + 1, config.input_dim))}

    def get_labels(self, model_class, inputs):
        return {"labels": torch.ones(len(inputs["inputs_embeds"]), device=torch_device)}


class RandomFeatureAttentionUpstreamTest(RandomFeatureTests, unittest.TestCase):
    model_type = "random_feature_attention"

    def get_config(self):
        return RandomFeatureAttentionConfig.from_variant("tiny")


class RandomFeatureMLPUpstreamTest(RandomFeatureTests, unittest.TestCase):
    model_type = "random_feature_mlp"

    def get_config(self):
        return RandomFeatureMLPConfig.from_variant("tiny")
