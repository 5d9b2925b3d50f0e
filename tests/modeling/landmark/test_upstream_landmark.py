"""transformers' common model tests for the models with landmark attention."""

import unittest

from hf_attn.modeling.landmark.configuration_landmark import LandmarkConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class PlainPrompts:
    def get_inputs(self, config):
        inputs = super().get_inputs(config)
        # Prompts are plain text: `generate` inserts the landmarks, and refuses those of others.
        inputs["input_ids"][inputs["input_ids"] == config.landmark_token_id] += 1
        return inputs


class LandmarkUpstreamTest(PlainPrompts, UpstreamCausalLMTests, unittest.TestCase):
    """Rows shorter than a block: nothing is inserted."""

    model_type = "landmark"

    def get_config(self):
        return LandmarkConfig.from_variant("tiny")


class LandmarkGPTUpstreamTest(PlainPrompts, UpstreamCausalLMTests, unittest.TestCase):
    """The layers of the paper's GPT."""

    model_type = "landmark"
    is_further_configuration = True

    def get_config(self):
        return LandmarkConfig.from_variant(
            "tiny", norm_type="layer_norm", gated_mlp=False, hidden_act="gelu", tie_word_embeddings=True
        )
