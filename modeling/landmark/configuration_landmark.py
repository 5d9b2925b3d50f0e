# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the models with landmark attention."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.decoder import DecoderConfig
from hf_attn.architectures.ranges import COUNT, SIZE


@strict
class LandmarkConfig(DecoderConfig):
    r"""Configuration of a [`LandmarkForCausalLM`]: a Llama-like model with landmark attention.

    Args:
        landmark_token_id (`int`, *optional*): token that closes a block; the last one of the vocabulary if not given.
        mem_freq (`int`): number of regular tokens of a block. With its landmark a block has `mem_freq + 1` tokens.
        train_context_length (`int`): length of the sequences at training, landmarks included. With retrieval, a chunk of
            the input together with the retrieved blocks is kept within it.
        include_landmark_in_loss (`bool`): whether landmarks were targets at training. If so, the token after a block is
            predicted from the block's landmark; if not, from the token before the landmark.

    The other arguments are those of [`~hf_attn.architectures.decoder.DecoderConfig`]; layer norms have no bias.
    """

    model_type = "landmark"
    variants = {
        "llama_7b": {
            "vocab_size": 32002,
            "landmark_token_id": 32001,
            "pad_token_id": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        "gpt_pg19": {
            "vocab_size": 50304,
            "landmark_token_id": 50260,
            "bos_token_id": None,
            "eos_token_id": 50256,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "norm_type": "layer_norm",
            "gated_mlp": False,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "include_landmark_in_loss": False,
        },
    }

    tiny = {
        "vocab_size": 99,
        "landmark_token_id": 3,
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
    ranges = {"landmark_token_id": COUNT, "mem_freq": SIZE, "train_context_length": SIZE}

    vocab_size: int = 32002
    landmark_token_id: int | None = None
    mem_freq: int = 50
    train_context_length: int = 512
    include_landmark_in_loss: bool = True
    norm_bias: bool = False

    def __post_init__(self, **kwargs):
        if self.landmark_token_id is None:
            self.landmark_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    @property
    def block_size(self) -> int:
        """Tokens of a block, landmark included."""
        return self.mem_freq + 1

    def validate_landmarks(self):
        """Part of the validation that `@strict` runs."""
        if self.landmark_token_id >= self.vocab_size:
            raise ValueError(
                f"landmark_token_id ({self.landmark_token_id}) must be below the vocabulary size, {self.vocab_size}."
            )
        if self.sliding_window is not None or "sliding_attention" in self.layer_types:
            raise ValueError(
                "Landmark attention does not support sliding windows: sliding_window must be None, got "
                f"{self.sliding_window}, and all layer_types must be 'full_attention'."
            )


__all__ = ["LandmarkConfig"]
