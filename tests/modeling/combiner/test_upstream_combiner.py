"""transformers' common model tests for Combiner."""

import unittest

from hf_attn.modeling.combiner.configuration_combiner import CombinerConfig, CombinerEncoderConfig
from tests.batteries.upstream import UpstreamCausalLMTests, UpstreamTextTests


_STATE = "spans are summarised, and a summary cannot forget the tokens that an assistant has guessed wrong"
_POSITIONS = "the positions of this configuration are added to the embeddings"
_STEPS = "a step of decoding has weights of summaries, not of the tokens behind them"


class CombinerUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "combiner"
    skipped = {
        "test_prompt_lookup_matches_greedy": _STATE,
        "test_generation_returns_requested_outputs": _STEPS,
        "test_model_rope_scaling_from_config*": _POSITIONS,
    }

    def get_config(self):
        return CombinerConfig.from_variant("tiny")


class CombinerRowmajorUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "combiner"
    is_further_configuration = True

    def get_config(self):
        return CombinerConfig.from_variant("tiny", combiner_kind="rowmajor", position_embedding_type="rope")


class CombinerEncoderUpstreamTest(UpstreamTextTests, unittest.TestCase):
    model_type = "combiner_encoder"
    skipped = {"test_model_rope_scaling_from_config*": _POSITIONS}

    def get_config(self):
        return CombinerEncoderConfig.from_variant("tiny")
