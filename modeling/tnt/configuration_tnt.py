# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of TNT."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import POSITIVE, SIZE
from hf_attn.architectures.staged_vision.configuration import StagedVisionConfig


@strict
class TNTConfig(StagedVisionConfig):
    r"""Configuration of a [`TNTForImageClassification`]; the defaults are TNT-S.

    Args:
        image_size (`int` or `list[int]`): side, or height and width, of the images.
        patch_size (`int`): side of a patch (a "sentence").
        num_channels (`int`): channels of the images.
        inner_stride (`int`): distance in pixels from one "word" of a patch to the next.
        hidden_size (`int`): width of the sentences.
        inner_hidden_size (`int`): width of the words.
        num_hidden_layers (`int`): number of blocks, each of which updates words and sentences.
        num_attention_heads (`int`): heads of the attention between sentences.
        inner_num_attention_heads (`int`): heads of the attention between the words of a sentence.
        mlp_ratio (`float`): width inside the MLP of the sentences, in units of `hidden_size`.
        inner_mlp_ratio (`float`, *optional*): the same of the words, `mlp_ratio` if not given.
        qkv_bias (`bool`): biases in the projections of queries, keys and values.
        qk_scale (`float`, *optional*): factor of the attention logits, `head_dim ** -0.5` if not given.
        squeeze_excitation (`bool`): the MLP of the sentences is followed by a gate on its channels.
        legacy (`bool`): the older design that only timm has: words come from a convolution of the whole image instead of
            each patch by itself, and each word by itself is normalised before it updates its sentence.
        pooling (`str`): input of the classifier: `"token"`, the class token, or `"mean"`, the mean of the other tokens.
        hidden_dropout_prob (`float`): dropout of embeddings, projections and MLPs.
        attention_probs_dropout_prob (`float`): dropout of the attention weights.
        drop_path_rate (`float`): stochastic depth of the last block; it grows linearly from 0.
        layer_norm_eps (`float`): epsilon of all LayerNorms.
        initializer_range (`float`): standard deviation of the initial weights.
        out_features (`list[str]`, *optional*): blocks that a backbone returns, of `"stem"`, `"stage1"`...
        out_indices (`list[int]`, *optional*): the same by number.
    """

    model_type = "tnt"
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    crop_ratio = 0.9
    variants = {
        "tnt_ti": {
            "hidden_size": 192,
            "inner_hidden_size": 12,
            "num_attention_heads": 3,
            "inner_num_attention_heads": 2,
            "num_labels": 1000,
        },
        "tnt_s": {
            "hidden_size": 384,
            "inner_hidden_size": 24,
            "num_attention_heads": 6,
            "inner_num_attention_heads": 4,
            "num_labels": 1000,
        },
        "tnt_b": {
            "hidden_size": 640,
            "inner_hidden_size": 40,
            "num_attention_heads": 10,
            "inner_num_attention_heads": 4,
            "num_labels": 1000,
        },
        "tnt_s_legacy": {
            "hidden_size": 384,
            "inner_hidden_size": 24,
            "num_attention_heads": 6,
            "inner_num_attention_heads": 4,
            "legacy": True,
            "num_labels": 1000,
        },
    }

    tiny = {
        "image_size": 32,
        "patch_size": 8,
        "inner_stride": 4,
        "hidden_size": 32,
        "inner_hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "inner_num_attention_heads": 2,
        "mlp_ratio": 2,
    }
    ranges = {
        "inner_stride": SIZE,
        "inner_hidden_size": SIZE,
        "inner_num_attention_heads": SIZE,
        "inner_mlp_ratio": POSITIVE,
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    inner_stride: int = 4
    hidden_size: int = 384
    inner_hidden_size: int = 24
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    inner_num_attention_heads: int = 4
    mlp_ratio: float | int = 4.0
    inner_mlp_ratio: float | int | None = None
    qkv_bias: bool = False
    qk_scale: float | int | None = None
    squeeze_excitation: bool = False
    legacy: bool = False
    pooling: Literal["token", "mean"] = "token"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.inner_mlp_ratio is None:
            self.inner_mlp_ratio = self.mlp_ratio
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        """Number of blocks, each of which is a stage of the backbone."""
        return self.num_hidden_layers

    @property
    def words_per_side(self) -> int:
        """Words along a side of a patch."""
        return math.ceil(self.patch_size / self.inner_stride)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        super().validate_architecture()
        if self.inner_hidden_size % self.inner_num_attention_heads != 0:
            raise ValueError(
                f"inner_hidden_size ({self.inner_hidden_size}) must be a multiple of inner_num_attention_heads "
                f"({self.inner_num_attention_heads})."
            )
        if any(side % self.patch_size for side in self.image_height_width):
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}).")
        if self.legacy and self.patch_size % self.inner_stride != 0:
            raise ValueError(
                f"The legacy design needs a patch_size ({self.patch_size}) that is a multiple of inner_stride "
                f"({self.inner_stride})."
            )


__all__ = ["TNTConfig"]
