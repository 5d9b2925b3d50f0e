"""transformers' common model tests for the wide transformers."""

import unittest

import torch

from hf_attn.modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from hf_attn.modeling.wide_attention.modeling_wide_attention import WideTransformerForDocumentMatching
from tests.batteries.upstream import UpstreamTextTests


class WideTransformerUpstreamTest(UpstreamTextTests, unittest.TestCase):
    """Softmax attention and a class token, which the states have in front of the texts."""

    model_type = "wide_attention"
    seq_length = 8

    def get_config(self):
        return WideTransformerConfig.from_variant("tiny")

    def get_inputs(self, config):
        inputs = super().get_inputs(config)
        return {name: tensor[:, 1:] for name, tensor in inputs.items()} if config.pooling == "cls" else inputs

    def get_labels(self, model_class, inputs):
        if model_class is not WideTransformerForDocumentMatching:
            return {}
        return {"labels": torch.zeros(self.batch_size, dtype=torch.long)}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class is WideTransformerForDocumentMatching:
            # Without a class token the texts are as long as the states of the others.
            for name in ("input_ids", "attention_mask"):
                inputs[name] = torch.cat([inputs[name][:, :1], inputs[name]], dim=1)
                inputs[f"other_{name}"] = inputs[name].flip(0)
        return inputs
