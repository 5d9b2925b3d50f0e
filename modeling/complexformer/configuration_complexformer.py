# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the ComplexFormer models."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import POSITIVE


@strict
class ComplexFormerConfig(DecoderConfig):
    r"""Configuration of a [`ComplexFormerForCausalLM`]: a Llama whose heads weigh the angle between query and key.

    Args:
        score_scale (`float`): factor of the scores. The method has none (1.0); `from_base` sets `head_dim ** -0.5`.
        frequency_rounding (`str`, *optional*): `"bfloat16"` rounds the frequencies of the positions to that precision, as
            one of the two official files does.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "complexformer"
    variants = {
        "repository": {
            "vocab_size": 250002,
            "hidden_size": 512,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "max_position_embeddings": 1024,
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
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    ranges = {"score_scale": POSITIVE}

    score_scale: float | int = 1.0
    frequency_rounding: Literal["bfloat16"] | None = None

    def validate_pairs(self):
        """Part of the validation that `@strict` runs."""
        if self.head_dim % 2:
            raise ValueError(
                f"Pairs of channels form complex numbers, so head_dim must be even, got {self.head_dim} (hidden_size "
                f"{self.hidden_size}, {self.num_attention_heads} heads)."
            )

    def validate_frequency_rounding(self):
        """Part of the validation that `@strict` runs."""
        if self.frequency_rounding is not None and self.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"frequency_rounding={self.frequency_rounding!r} is for default rotary frequencies, but "
                f"rope_parameters has rope_type {self.rope_parameters['rope_type']!r}."
            )


__all__ = ["ComplexFormerConfig"]
