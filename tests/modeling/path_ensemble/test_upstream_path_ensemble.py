"""transformers' common model tests for the path ensemble."""

import unittest

from hf_attn.modeling.path_ensemble.configuration_path_ensemble import PathEnsembleConfig
from tests.batteries.upstream import UpstreamImageTests


def tiny_config(**overrides) -> PathEnsembleConfig:
    """By default nothing is pruned and nothing is scaled."""
    return PathEnsembleConfig.from_variant("tiny", **{"pruned_paths": [], "ensemble_scale": None, **overrides})


class PathEnsembleUpstreamTest(UpstreamImageTests, unittest.TestCase):
    """One path pruned, the others scaled."""

    model_type = "path_ensemble"
    facts = {"seq_length": 17}

    def get_config(self):
        return PathEnsembleConfig.from_variant("tiny")


class PathEnsembleDistilledUpstreamTest(PathEnsembleUpstreamTest):
    """The layout of DeiT with two heads, LayerScale, paths of branches, and self-distillation."""

    is_further_configuration = True
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
