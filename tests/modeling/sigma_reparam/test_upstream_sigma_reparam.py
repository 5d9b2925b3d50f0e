"""transformers' common model tests for the vision transformers with sigma-reparametrised maps."""

import unittest

from hf_attn.modeling.sigma_reparam.configuration_sigma_reparam import SigmaReparamViTConfig
from tests.batteries.upstream import UpstreamImageTests


class SigmaReparamViTUpstreamTest(UpstreamImageTests, unittest.TestCase):
    model_type = "sigma_reparam_vit"
    facts = {"seq_length": 17}
    skipped = {
        "test_init_weights_can_init_buffers": "u is a singular vector of weights that are drawn anew; a test of our own checks it",
        "test_can_load_ignoring_mismatched_shapes": "expects num_labels rows of every parameter of the classifier, and gamma "
        "has one; a test of our own checks it",
    }

    def get_config(self):
        return SigmaReparamViTConfig.from_variant("tiny")
