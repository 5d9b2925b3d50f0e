# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the MemoryFormer models."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.memory_layer import check_code
from hf_attn.architectures.ranges import COUNT, POSITIVE, RATE, SIZE


@strict
class MemoryFormerConfig(DecoderConfig):
    r"""Configuration of a [`MemoryFormerForCausalLM`]; the defaults are the tiny model of the paper, of the shape of Pythia-70M.

    Args:
        code_length (`int`): channels of a chunk; the first memory layers have tables of `2**code_length` rows.
        num_tables (`int`, *optional*): number of chunks, `hidden_size / code_length` if not given.
        extra_bits (`int`): by how many channels a chunk is longer between the two memory layers of the feed-forward block.
        bucket_weight (`str`): `"l1_scaled"` (the public code) or `"probability"` (the paper), see
            [`~hf_attn.architectures.memory_layer.MemoryLayer`].
        temperature (`float`): of the probability.
        sparse_gradients (`bool`): whether tables get sparse gradients.
        hidden_dropout (`float`): dropout of the output of attention and of the feed-forward block.
        intermediate_size (`int`, *optional*): width between these memory layers, `num_tables * (code_length + extra_bits)`.
        rms_norm_eps (`float`): epsilon of the norms, added to the root.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`].
    """

    model_type = "memoryformer"
    variants = {
        "tiny_70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
        "small_160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "base_410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    }
    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "code_length": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ranges = {
        "code_length": SIZE,
        "num_tables": SIZE,
        "extra_bits": COUNT,
        "temperature": POSITIVE,
        "hidden_dropout": RATE,
    }
    # Llama's plan is about matrices.
    base_model_tp_plan = None

    vocab_size: int = 50304
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    code_length: int = 8
    num_tables: int | None = None
    extra_bits: int = 2
    bucket_weight: Literal["l1_scaled", "probability"] = "l1_scaled"
    temperature: float | int = 1.0
    sparse_gradients: bool = False
    hidden_dropout: float | int = 0.0
    rms_norm_eps: float = 1e-8
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            # Pythia's
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        if self.num_tables is None and self.code_length > 0:
            self.num_tables = self.hidden_size // self.code_length
        check_code(self.hidden_size, self.num_tables or 0, self.code_length, "hidden_size")
        width = self.num_tables * (self.code_length + self.extra_bits)
        if self.intermediate_size not in (None, width):
            raise ValueError(
                f"intermediate_size follows from the tables, num_tables * (code_length + extra_bits) = {width}; got "
                f"{self.intermediate_size}."
            )
        self.intermediate_size = width
        super().__post_init__(**kwargs)

    def validate_output(self):
        """Part of the validation that `@strict` runs."""
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                "Without an output projection, num_attention_heads * head_dim must equal hidden_size "
                f"({self.hidden_size}), got {self.num_attention_heads * self.head_dim}."
            )


__all__ = ["MemoryFormerConfig"]
