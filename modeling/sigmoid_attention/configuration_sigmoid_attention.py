# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the causal language models with sigmoid attention."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import FINITE
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


#: where AXLearn's models differ from the defaults besides their size
_GALA = {"qk_norm_after_rope": True, "separate_trailing_padding": True}


@strict
class SigmoidAttentionConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`SigmoidAttentionForCausalLM`]; the defaults are the 85M model of the paper's "Gala" series.

    Args:
        vocab_size (`int`): number of tokens.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width inside the feed-forward block.
        num_hidden_layers (`int`): number of decoder layers.
        num_attention_heads (`int`): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key/value heads, `num_attention_heads` if not given.
        head_dim (`int`, *optional*): width of a head, `hidden_size // num_attention_heads` if not given.
        max_position_embeddings (`int`): longest sequence at training, the `n` of the bias.
        sigmoid_bias (`float`, *optional*): the constant `b` added to the logits, `-log(max_position_embeddings)` if not
            given. It never depends on the length of the input.
        attention_log_temperature (`float`): the logits (not the bias) are multiplied by the exponential of this.
        position_embedding_type (`str`): `"alibi"`, `"rope"`, `"sincos"` (added to the embeddings) or `"none"`.
        rope_parameters (`dict`, *optional*): parameters of transformers' rotary embedding (half-split pairing).
        norm_structure (`str`): `"prenorm"`, x + f(norm(x)), or `"hybridnorm"`, x + norm(f(norm(x))), in both branches.
        norm_type (`str`): `"rms_norm"` or `"layer_norm"`, of all norms.
        norm_eps (`float`): epsilon of the norms of the layers.
        final_norm_eps (`float`): epsilon of the last norm.
        qk_norm (`bool`): whether queries and keys are normalised in each head.
        qk_norm_after_rope (`bool`): whether that happens after the rotary embedding instead of before.
        layer_scale_init_value (`float`, *optional*): initial value of LayerScale on both branches; none if not given.
        hidden_act (`str`): activation of the feed-forward block.
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        attention_bias (`bool`): biases in the projections of the attention.
        mlp_bias (`bool`): biases in the feed-forward block.
        attention_dropout (`float`): dropout of the attention weights.
        separate_trailing_padding (`bool`): without an `attention_mask`, a run of `pad_token_id` at the end of a row is a
            sequence of its own that attends to itself only. Other tokens are the same either way.
        initializer_range (`float`, *optional*): standard deviation of the initial weights, `1 / sqrt(fan_in)` of each if
            not given.
    """

    model_type = "sigmoid_attention"
    keys_to_ignore_at_inference = ["past_key_values"]
    variants = {
        "gala_85m": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            **_GALA,
        },
        "gala_1b": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            **_GALA,
        },
        "gala_7b": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            **_GALA,
        },
    }

    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    ranges = {"sigmoid_bias": FINITE, "attention_log_temperature": FINITE}

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    sigmoid_bias: float | int | None = None
    attention_log_temperature: float | int = 0.0
    position_embedding_type: Literal["alibi", "rope", "sincos", "none"] = "alibi"
    rope_parameters: dict | None = None
    norm_structure: Literal["prenorm", "hybridnorm"] = "hybridnorm"
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    final_norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_norm_after_rope: bool = False
    layer_scale_init_value: float | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    separate_trailing_padding: bool = False
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.sigmoid_bias is None:
            self.sigmoid_bias = -math.log(self.max_position_embeddings)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        if self.position_embedding_type == "rope" and self.head_dim % 2 != 0:
            raise ValueError(f"A rotary embedding needs an even head_dim, got {self.head_dim}.")
        if self.position_embedding_type == "sincos" and self.hidden_size % 2 != 0:
            raise ValueError(f"A sine-cosine embedding needs an even hidden_size, got {self.hidden_size}.")


__all__ = ["SigmoidAttentionConfig"]
