"""transformers' common model tests for Activator."""

import unittest

from hf_attn.modeling.activator.configuration_activator import ActivatorConfig
from tests.upstream import UpstreamImageTests


TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.1,
}


class ActivatorUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "activator"
    has_attentions = False
    facts = {"seq_length": 16}

    def get_config(self):
        return ActivatorConfig(**TINY)


class ActivatorGegluOnlyUpstreamTest(ActivatorUpstreamTest):
    """Without the MLP."""

    def get_config(self):
        return ActivatorConfig(**TINY, use_mlp=False)
