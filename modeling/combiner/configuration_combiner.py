# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the Combiner models."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import RATE, SIZE


_BASE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "combiner_segment_length": 128,
}
_TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "combiner_segment_length": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@strict
class CombinerConfig(DecoderConfig):
    r"""Configuration of a [`CombinerForCausalLM`].

    The defaults are the language model of the official JAX code; the variants named after its TensorFlow configurations have
    their sizes, and this layout.

    Args:
        combiner_kind (`str`): plan of direct tokens and summaries: `"fixed"`, `"logsparse"`,
            `"rowmajor"` (whose summaries have weights), `"vertical"`, `"horizontal"` or `"mixture"`.
        combiner_segment_length (`int`, *optional*): tokens of a segment, the row of an image for example; near the square
            root of `max_position_embeddings` if not given. `"logsparse"` has none.
        combiner_pool (`str`): how queries and keys of a span become one: `"max"`, `"mean"` or `"sum"`.
        own_segment_summary (`bool`): whether a token of an encoder also attends to the summary of its own segment, as in the
            official TensorFlow code.
        position_embedding_type (`str`): `"sinusoidal"`, added to the embeddings, or `"rope"`.
        lm_head_bias (`bool`): whether the language modelling head has a bias.
        residual_dropout (`float`): dropout of the output of each block.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`]; `rms_norm_eps` is the epsilon of all
    norms.
    """

    model_type = "combiner"
    variants = {
        "jax_default": {},
        "fixed_lm": {**_BASE, "combiner_kind": "fixed"},
        "rowmajor_lm": {**_BASE, "combiner_kind": "rowmajor"},
        "mixture_lm": {**_BASE, "combiner_kind": "mixture"},
        "cifar10": {
            "vocab_size": 256,
            "max_position_embeddings": 3072,
            "combiner_segment_length": 96,
            "combiner_kind": "rowmajor",
        },
        "imagenet64": {
            "vocab_size": 256,
            "max_position_embeddings": 12288,
            "combiner_segment_length": 192,
            "combiner_kind": "rowmajor",
        },
    }
    tiny = _TINY
    ranges = {"combiner_segment_length": SIZE, "residual_dropout": RATE}

    vocab_size: int = 1024
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    norm_type: Literal["rms_norm", "layer_norm"] = "layer_norm"
    rms_norm_eps: float | int = 1e-6
    gated_mlp: bool = False
    mlp_bias: bool = True
    hidden_act: str = "relu"

    combiner_kind: Literal["fixed", "logsparse", "rowmajor", "vertical", "horizontal", "mixture"] = "fixed"
    combiner_segment_length: int | None = None
    combiner_pool: Literal["max", "mean", "sum"] = "max"
    own_segment_summary: bool = False
    position_embedding_type: Literal["sinusoidal", "rope"] = "sinusoidal"
    lm_head_bias: bool = True
    residual_dropout: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.combiner_segment_length is None:
            self.combiner_segment_length = max(1, round(self.max_position_embeddings**0.5))
        super().__post_init__(**kwargs)

    def validate_combiner(self):
        """Part of the validation that `@strict` runs."""
        if self.combiner_segment_length < 1:
            raise ValueError(f"combiner_segment_length must be at least 1, got {self.combiner_segment_length}.")
        if self.sliding_window is not None or "sliding_attention" in self.layer_types:
            raise ValueError(
                "Combiner does not support sliding windows, because spans are summarised as a whole. Leave out sliding_window and layer_types."
            )
        if self.position_embedding_type == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            raise ValueError(f"Sinusoidal positions need an even hidden_size of at least 4, got {self.hidden_size}.")
        if self.own_segment_summary and self.is_causal:
            raise ValueError(
                "own_segment_summary is for encoders: the summary of its own segment would contain later tokens."
            )


@strict
class CombinerEncoderConfig(CombinerConfig):
    r"""Configuration of a [`CombinerForMaskedLM`], in which every token attends to all tokens.

    The arguments are those of [`CombinerConfig`]. The paper's text defines `"fixed"`, `"rowmajor"`, `"vertical"` and
    `"horizontal"` for it.
    """

    model_type = "combiner_encoder"
    is_causal: ClassVar[bool] = False
    variants = {
        "fixed_mlm": {**_BASE, "combiner_kind": "fixed"},
        "rowmajor_mlm": {**_BASE, "combiner_kind": "rowmajor"},
    }
    tiny = _TINY

    use_cache: bool = False

    def validate_kind(self):
        """Part of the validation that `@strict` runs."""
        if self.combiner_kind in ("logsparse", "mixture"):
            raise ValueError(
                f"combiner_kind={self.combiner_kind!r} is defined for causal models only. Use 'fixed', 'rowmajor', "
                "'vertical' or 'horizontal'."
            )
        if self.own_segment_summary and self.combiner_kind == "vertical":
            raise ValueError("own_segment_summary needs summaries of segments, but 'vertical' summarises columns.")


__all__ = ["CombinerConfig", "CombinerEncoderConfig"]
