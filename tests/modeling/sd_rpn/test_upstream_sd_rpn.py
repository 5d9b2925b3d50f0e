"""transformers' common model tests for the region proposal network."""

import unittest

import torch

from hf_attn.modeling.sd_rpn.configuration_sd_rpn import SdRpnConfig
from tests.batteries.upstream import UpstreamModelTests, common


class SdRpnUpstreamTest(UpstreamModelTests, unittest.TestCase):
    model_type = "sd_rpn"
    seq_length = 7
    has_attentions = False
    skipped = {
        **dict.fromkeys(
            ("test_model_get_set_embeddings", "test_resize_*embeddings*"),
            "the network starts from a base's hidden states",
        ),
        **dict.fromkeys(
            ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
            "the output is a RoI map; the states of the few layers are not returned",
        ),
    }

    def get_config(self):
        return SdRpnConfig.from_variant("tiny")

    def get_inputs(self, config):
        image_mask = torch.zeros(self.batch_size, self.seq_length, dtype=torch.bool)
        image_mask[:, 1:5] = True
        angles = torch.arange(self.seq_length)[:, None] * torch.ones(config.head_dim)
        return {
            "hidden_states": common.floats_tensor((self.batch_size, self.seq_length, config.hidden_size)),
            "position_embeddings": (angles.cos()[None], angles.sin()[None]),
            "image_mask": image_mask,
        }

    def get_labels(self, model_class, inputs):
        return {"roi_target_map": torch.tensor([[0, 1, -100, 1]] * self.batch_size)}
