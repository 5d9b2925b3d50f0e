"""transformers' common model tests for Activator."""

import unittest

from hf_attn.modeling.activator.configuration_activator import ActivatorConfig
from tests.batteries.upstream import UpstreamImageTests


class ActivatorUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "activator"
    has_attentions = False
    facts = {"seq_length": 16}

    def get_config(self):
        return ActivatorConfig.from_variant("tiny")


class ActivatorGegluOnlyUpstreamTest(ActivatorUpstreamTest):
    """Without the MLP."""

    is_further_configuration = True

    def get_config(self):
        return ActivatorConfig.from_variant("tiny", use_mlp=False)
