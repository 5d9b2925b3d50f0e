"""transformers' common model tests for Activator."""

import unittest

from hf_attn.modeling.activator.configuration_activator import ActivatorConfig
from tests.batteries.upstream import UpstreamImageTests


def tiny_config(**overrides) -> ActivatorConfig:
    fields = {
        "image_size": 16,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.1,
    }
    return ActivatorConfig(**{**fields, **overrides})


class ActivatorUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "activator"
    has_attentions = False
    facts = {"seq_length": 16}

    def get_config(self):
        return tiny_config()


class ActivatorGegluOnlyUpstreamTest(ActivatorUpstreamTest):
    """Without the MLP."""

    def get_config(self):
        return tiny_config(use_mlp=False)
