# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a text embedder made from a decoder."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder.configuration import DecoderConfig
from hf_attn.architectures.ranges import SIZE, Range


_MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_QWEN2_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "attention_output_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@strict
class PoolingAttentionConfig(DecoderConfig):
    r"""Configuration of a [`PoolingAttentionModel`]: a decoder, and one of the paper's five designs to embed texts with it.

    Args:
        design (`int`): 1 to 5.

            | design | attention | pooled | head |
            |---|---|---|---|
            | 1 | causal | the last token of the last layer | none |
            | 2 | causal | the last token of the last layer | trainable |
            | 3 | causal | the last token of each layer | trainable |
            | 4 | bidirectional | all tokens of the last layer | trainable |
            | 5 | bidirectional | the mean over the tokens of each layer | trainable |
        num_latents (`int`): number r of latents of the trainable head.
        num_pooling_heads (`int`): number H of its attention heads.
        pooling_head_dim (`int`): width w of a head. It is independent of `hidden_size`.
        pooling_std (`float`): standard deviation of new latents and rows of the layer table.
        pooling_init (`str`): how a new head starts: `"random"` as in the paper, or `"mean"`, which makes its output nearly the mean
            of the normalised vectors that it pools, so that little training does not have to make up for a random map. It
            multiplies `pooling_std` by 0.02.
        mean_over (`str`): the tokens whose mean design 5 takes: `"attention_mask"`, or `"pad_token_id"` for the official
            rule, over all tokens except the padding token, regardless of the mask.
        prompts (`dict[str, str]`): name of a task (`query`, `document`) -> text that sentence-transformers puts before a
            text of that task.

    The other arguments are those of [`DecoderConfig`]. The defaults of the head are the official ones, made for a width of
    4096: at `hidden_size=4096` it has 1.3 billion parameters and costs 1.2 TFLOP a text.
    """

    model_type = "pooling_attention"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    variants = {
        **{f"mistral_7b_design{design}": {**_MISTRAL_7B, "design": design} for design in range(1, 6)},
        **{f"qwen2_0.5b_design{design}": {**_QWEN2_05B, "design": design} for design in range(1, 6)},
    }
    tiny = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "design": 5,
        "num_latents": 5,
        "num_pooling_heads": 2,
        "pooling_head_dim": 8,
    }
    ranges = {
        "design": Range(at_least=1, at_most=5),
        "num_latents": SIZE,
        "num_pooling_heads": SIZE,
        "pooling_head_dim": SIZE,
        "pooling_std": Range(at_least=0),
    }

    use_cache: bool = False
    design: int = 5
    num_latents: int = 768
    num_pooling_heads: int = 32
    pooling_head_dim: int = 2048
    pooling_std: float | int = 1.0
    pooling_init: Literal["random", "mean"] = "random"
    mean_over: Literal["attention_mask", "pad_token_id"] = "attention_mask"
    prompts: dict[str, str] | None = None

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to itself and earlier tokens."""
        return self.__dict__.get("_called_causal", self.design <= 3)

    @is_causal.setter
    def is_causal(self, value: bool) -> None:
        # transformers sets it during a call, to its old value or to an argument of the call.
        if value == (self.design <= 3):
            self.__dict__.pop("_called_causal", None)
        else:
            self.__dict__["_called_causal"] = value

    @property
    def has_head(self) -> bool:
        """Whether the design has a trainable head."""
        return self.design > 1

    @property
    def pools_layers(self) -> bool:
        """Whether the input of the head is one vector per layer; otherwise it is those of the last layer."""
        return self.design in (3, 5)

    def validate_design(self):
        """Part of the validation that `@strict` runs."""
        if not self.is_causal and "sliding_attention" in self.layer_types:
            raise ValueError(
                f"Design {self.design} is bidirectional and has no attention windows: set sliding_window and layer_types to "
                "None."
            )
        if self.mean_over == "pad_token_id" and self.pad_token_id is None:
            raise ValueError("mean_over='pad_token_id' needs a pad_token_id.")


__all__ = ["PoolingAttentionConfig"]
