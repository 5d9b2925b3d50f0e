"""transformers' common model tests for the wide transformers."""

import unittest

import torch

from hf_attn.modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from hf_attn.modeling.wide_attention.modeling_wide_attention import (
    WideTransformerForDocumentMatching,
    WideTransformerForSequenceClassification,
    WideTransformerModel,
)
from tests.batteries.upstream import UpstreamTextTests


class WideTransformerUpstreamTest(UpstreamTextTests, unittest.TestCase):
    """Without a class token, which the model that matches documents never has."""

    model_type = "wide_attention"
    skipped = {
        "test_model_rope_scaling_from_config*": "the model has no rotary embedding",
        "test_retain_grad_hidden_states_attentions": (
            "the model that matches documents returns its states by documents, which are views behind the computation"
        ),
    }

    def get_config(self):
        return WideTransformerConfig.from_variant("tiny", pooling="first")

    def get_labels(self, model_class, inputs):
        if model_class is not WideTransformerForDocumentMatching:
            return {}
        return {"labels": torch.zeros(self.batch_size, dtype=torch.long)}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class is WideTransformerForDocumentMatching:
            for name in ("input_ids", "attention_mask"):
                if inputs.get(name) is not None:
                    inputs[f"other_{name}"] = inputs[name].roll(1, dims=1)
        return inputs


class WideTransformerClassTokenUpstreamTest(UpstreamTextTests, unittest.TestCase):
    """With a class token, which precedes the text in the hidden states."""

    model_type = "wide_attention"
    is_further_configuration = True
    seq_length = 8

    def setUp(self):
        super().setUp()
        self.all_model_classes = (WideTransformerForSequenceClassification, WideTransformerModel)

    def get_config(self):
        return WideTransformerConfig.from_variant("tiny")

    def get_inputs(self, config):
        return {name: tensor[:, 1:] for name, tensor in super().get_inputs(config).items()}
