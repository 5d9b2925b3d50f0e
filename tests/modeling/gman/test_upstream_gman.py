"""transformers' common model tests for GMAN."""

import unittest

import torch

from hf_attn.modeling.gman.configuration_gman import GMANConfig
from tests.batteries.upstream import UpstreamModelTests, common


class GMANUpstreamTest(UpstreamModelTests, unittest.TestCase):
    model_type = "gman"

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
        shape = (self.batch_size, config.prediction_length, config.num_nodes)
        return {"labels": 1 + common.floats_tensor(shape)} if model_class.__name__ == "GMANForPrediction" else {}
