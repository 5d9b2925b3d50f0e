"""transformers' common model tests for OAT."""

import unittest

import torch

from hf_attn.modeling.oat.configuration_oat import OATConfig
from tests.batteries.upstream import UpstreamModelTests, common


NUM_OBJECTS, LENGTH = 6, 5


class OATUpstreamTest(UpstreamModelTests, common.GenerationTesterMixin, unittest.TestCase):
    model_type = "oat"
    is_encoder_decoder = True
    facts = {
        "seq_length": NUM_OBJECTS + 1,
        "encoder_seq_length": NUM_OBJECTS + 1,
        "decoder_seq_length": LENGTH,
    }
    skipped = dict.fromkeys(
        ("test_inputs_embeds*", "test_model_get_set_embeddings", "test_resize_*embeddings*"),
        "the tokens are made of images",
    ) | {
        "test_eager_matches_sdpa_inference*": "makes inputs of its own, without a target; test_modeling_oat compares both",
    }

    def get_config(self):
        return OATConfig.from_variant("tiny", encoder_layers=2)

    def get_inputs(self, config):
        size = (config.num_channels, config.crop_height, config.crop_width)
        generator = torch.Generator().manual_seed(0)
        begin = torch.full((self.batch_size, 1), NUM_OBJECTS + 2)
        fixations = torch.randint(0, NUM_OBJECTS, (self.batch_size, LENGTH - 1), generator=generator)
        return {
            "pixel_values": torch.rand(self.batch_size, NUM_OBJECTS, *size, generator=generator),
            "target_index": torch.arange(self.batch_size),
            "decoder_input_ids": torch.cat([begin, fixations], dim=1),
        }

    def get_labels(self, model_class, inputs):
        if "Scanpath" not in model_class.__name__:
            return {}
        return {"labels": torch.arange(self.batch_size * LENGTH).view(self.batch_size, LENGTH) % (NUM_OBJECTS + 1)}
