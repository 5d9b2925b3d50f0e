"""transformers' common model tests for DRCT."""

import unittest

from hf_attn.modeling.drct.configuration_drct import DRCTConfig
from tests.batteries.restoration import UpstreamRestorationTests


class DRCTUpstreamTest(UpstreamRestorationTests, unittest.TestCase):
    model_type = "drct"

    def get_config(self):
        return DRCTConfig.from_variant("tiny")
