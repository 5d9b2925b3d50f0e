"""transformers' common model tests for DeBERTa with its mask decoder."""

import unittest

from hf_attn.modeling.deberta.configuration_deberta import DebertaEMDConfig
from tests.batteries.upstream import UpstreamTextTests


class DebertaEMDUpstreamTest(UpstreamTextTests, unittest.TestCase):
    model_type = "deberta_emd"

    def get_config(self):
        return DebertaEMDConfig.from_variant("tiny")
