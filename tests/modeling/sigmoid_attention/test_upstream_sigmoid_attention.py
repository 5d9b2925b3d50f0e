"""transformers' common model tests for the language models with sigmoid attention."""

import unittest

from hf_attn.modeling.sigmoid_attention.configuration_sigmoid_attention import SigmoidAttentionConfig
from tests.batteries.upstream import UpstreamCausalLMTests


class SigmoidAttentionUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    """The family's default: ALiBi, hybrid norms, RMSNorm of queries and keys."""

    model_type = "sigmoid_attention"
    skipped = {"test_model_rope_scaling_from_config*": "ALiBi: the model has no rotary embedding"}

    def get_config(self):
        return SigmoidAttentionConfig.from_variant("tiny")


class SigmoidAttentionRopeUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
    """The opposite configuration: rotary embedding, LayerNorm before each branch, LayerScale, plain MLP, biases."""

    model_type = "sigmoid_attention"
    is_further_configuration = True

    def get_config(self):
        return SigmoidAttentionConfig.from_variant(
            "tiny",
            position_embedding_type="rope",
            norm_structure="prenorm",
            norm_type="layer_norm",
            layer_scale_init_value=0.1,
            hidden_act="gelu",
            gated_mlp=False,
            attention_bias=True,
            mlp_bias=True,
            initializer_range=0.02,
            tie_word_embeddings=False,
        )
