"""transformers' common model tests for dementia fusion."""

import unittest

import torch

from hf_attn.modeling.dementia_fusion.configuration_dementia_fusion import DementiaFusionConfig
from tests.batteries.upstream import UpstreamModelTests, common


class DementiaFusionUpstreamTest(UpstreamModelTests, unittest.TestCase):
    model_type = "dementia_fusion"
    _is_composite = True
    has_attentions = False
    seq_length = 7
    skipped = {
        **dict.fromkeys(
            ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
            "two encoders have hidden states, each with a field of its own; test_modeling_dementia_fusion tests them",
        ),
        "test_reverse_loading_mapping": "the family saves the tensors of its encoders under their own names, so nothing is mapped",
    }

    def get_config(self):
        return DementiaFusionConfig.from_variant("tiny")

    def get_inputs(self, config):
        size = config.vision_config.image_size
        return {
            "input_ids": common.ids_tensor((self.batch_size, self.seq_length), config.text_config.vocab_size),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
            "pixel_values": common.floats_tensor((self.batch_size, 3, size, size)),
        }

    def get_labels(self, model_class, inputs):
        has_labels = "Classification" in model_class.__name__
        return {"labels": torch.arange(self.batch_size) % 2} if has_labels else {}
