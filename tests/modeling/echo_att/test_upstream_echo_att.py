"""transformers' common model tests for EchoAtt."""

import unittest

from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class EchoAttUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    model_type = "echo_att"
    skipped = {
        "test_num_layers_is_small": "two shared layers and two with a map of their own are the smallest telling model",
    }

    def get_config(self):
        return EchoAttConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            shared_layers=[1, 3],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
