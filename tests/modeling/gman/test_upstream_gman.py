"""transformers' common model tests for GMAN."""

import unittest

import torch
from transformers.testing_utils import torch_device

from hf_attn.modeling.gman.configuration_gman import GMANConfig
from tests.batteries.upstream import UpstreamModelTests, common


class GMANUpstreamTest(UpstreamModelTests, unittest.TestCase):
    model_type = "gman"
    skipped = {
        "test_attention_outputs": "the attentions are of three kinds, each with a field of its own; test_gman.py tests them",
        "test_hidden_states_output": "encoder and decoder have hidden states of unlike lengths; test_gman.py tests them",
        "test_init_weights_can_init_buffers": "the vectors of the sensors start random, as in no model of upstream",
        "test_resize_tokens_embeddings": "there are no token embeddings",
        "test_model_get_set_embeddings": "there are no token embeddings",
        "test_eager_matches_sdpa_inference*": "upstream feeds past_values alone; the goldens compare eager with sdpa",
    }
    has_attentions = False

    def get_config(self):
        return GMANConfig.from_variant("tiny")

    def get_inputs(self, config):
        def time_features(steps):
            days = common.ids_tensor((self.batch_size, steps), 7)
            return torch.stack([days, common.ids_tensor((self.batch_size, steps), config.steps_per_day)], dim=-1)

        return {
            "past_values": common.floats_tensor((self.batch_size, config.context_length, config.num_nodes)),
            "past_time_features": time_features(config.context_length),
            "future_time_features": time_features(config.prediction_length),
        }

    def get_labels(self, model_class, inputs):
        config = self.get_config()
        labels = torch.ones(self.batch_size, config.prediction_length, config.num_nodes, device=torch_device)
        return {"labels": labels} if model_class.__name__ == "GMANForPrediction" else {}
