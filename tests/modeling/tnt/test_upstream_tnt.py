"""transformers' common model tests for TNT."""

import unittest

from hf_attn.modeling.tnt.configuration_tnt import TNTConfig
from tests.batteries.upstream import UpstreamBackboneTests, UpstreamImageTests


class TNTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "tnt"
    facts = {"seq_length": 17}

    def get_config(self):
        return TNTConfig.from_variant("tiny")


class TNTBackboneUpstreamTest(UpstreamBackboneTests, unittest.TestCase):
    model_type = "tnt"

    def get_config(self):
        return TNTConfig.from_variant("tiny", out_features=["stem", "stage2"])
