"""transformers' common model tests for the path ensemble."""

import unittest

from hf_attn.modeling.path_ensemble.configuration_path_ensemble import PathEnsembleConfig
from tests.batteries.upstream import UpstreamImageTests


def tiny_config(**overrides) -> PathEnsembleConfig:
    fields = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return PathEnsembleConfig(**{**fields, **overrides})


class PathEnsembleUpstreamTest(UpstreamImageTests, unittest.TestCase):
    """One path pruned, the others scaled."""

    model_type = "path_ensemble"
    facts = {"seq_length": 17}

    def get_config(self):
        return tiny_config(pruned_paths=[0], ensemble_scale="channel")


class PathEnsembleDistilledUpstreamTest(PathEnsembleUpstreamTest):
    """The layout of DeiT with two heads, LayerScale, paths of branches, and self-distillation."""

    facts = {"seq_length": 18}

    def get_config(self):
        return tiny_config(
            granularity="branch",
            ensemble_scale="scalar",
            distillation_token=True,
            distillation_head=True,
            layer_scale_init_value=0.1,
            distillation_logits_weight=0.5,
            distillation_hidden_weight=0.5,
        )
