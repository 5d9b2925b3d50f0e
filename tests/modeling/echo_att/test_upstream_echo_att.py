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
        return EchoAttConfig.from_variant("tiny")
