# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the causal language models with sigmoid attention."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import FINITE


#: where AXLearn's models differ from the defaults besides their size
_GALA = {"qk_norm_after_rope": True, "separate_trailing_padding": True}


@strict
class SigmoidAttentionConfig(DecoderConfig):
    r"""Configuration of a [`SigmoidAttentionForCausalLM`]; the defaults are the 85M model of the paper's "Gala" series.

    Args:
        max_position_embeddings (`int`): longest sequence at training, the `n` of the bias.
        sigmoid_bias (`float`, *optional*): the constant `b` added to the logits, `-log(max_position_embeddings)` if not
            given. It never depends on the length of the input.
        attention_log_temperature (`float`): the logits (not the bias) are multiplied by the exponential of this.
        position_embedding_type (`str`): `"alibi"`, `"rope"`, `"sincos"` (added to the embeddings) or `"none"`.
        norm_structure (`str`): `"prenorm"`, x + f(norm(x)), or `"hybridnorm"`, x + norm(f(norm(x))), in both branches.
        rms_norm_eps (`float`): epsilon of the norms of the layers, also called `norm_eps`.
        final_norm_eps (`float`): epsilon of the last norm.
        qk_norm_after_rope (`bool`): whether that happens after the rotary embedding instead of before.
        layer_scale_init_value (`float`, *optional*): initial value of LayerScale on both branches; none if not given.
        separate_trailing_padding (`bool`): without an `attention_mask`, a run of `pad_token_id` at the end of a row is a
            sequence of its own that attends to itself only. Other tokens are the same either way.
        initializer_range (`float`, *optional*): standard deviation of the initial weights, `1 / sqrt(fan_in)` of each if
            not given.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "sigmoid_attention"
    attribute_map = {"norm_eps": "rms_norm_eps"}
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
    max_position_embeddings: int = 4096
    sigmoid_bias: float | int | None = None
    attention_log_temperature: float | int = 0.0
    position_embedding_type: Literal["alibi", "rope", "sincos", "none"] = "alibi"
    norm_structure: Literal["prenorm", "hybridnorm"] = "hybridnorm"
    rms_norm_eps: float = 1e-5
    final_norm_eps: float = 1e-5
    qk_norm: bool = True
    qk_norm_after_rope: bool = False
    layer_scale_init_value: float | None = None
    separate_trailing_padding: bool = False
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        if self.sigmoid_bias is None:
            self.sigmoid_bias = -math.log(self.max_position_embeddings)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        super().validate_architecture()
        if self.position_embedding_type == "rope" and self.head_dim % 2 != 0:
            raise ValueError(f"A rotary embedding needs an even head_dim, got {self.head_dim}.")
        if self.position_embedding_type == "sincos" and self.hidden_size % 2 != 0:
            raise ValueError(f"A sine-cosine embedding needs an even hidden_size, got {self.hidden_size}.")


__all__ = ["SigmoidAttentionConfig"]
