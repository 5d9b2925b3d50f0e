# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The part of a configuration that image-restoration families have in common."""

from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.hub import HubConfigMixin

from ..ranges import POSITIVE, SIZE, Range
from ..variants import VariantsMixin


@strict
class ImageRestorationConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of the shell in which image-restoration families run: shallow convolution, groups, reconstruction.

    Args:
        num_channels (`int`): channels of the image. With 3 the mean of RGB natural images is subtracted and added back.
        embed_dim (`int`): width of the tokens; a token is a pixel.
        depths (`list[int]`): number of blocks of each residual group.
        num_heads (`list[int]`): number of attention heads of each residual group.
        window_size (`int`): side of the attention windows; inputs are padded to multiples of it.
        mlp_ratio (`float`): width inside the MLP relative to `embed_dim`.
        qkv_bias (`bool`): bias in the projection to queries, keys and values.
        qk_scale (`float`, *optional*): scale of the logits, `head_dim**-0.5` if not given (or zero).
        hidden_dropout_prob (`float`): dropout after embeddings, projections and in the MLP.
        attention_probs_dropout_prob (`float`): dropout of the attention weights.
        drop_path_rate (`float`): stochastic depth of the last block; grows linearly from 0.
        layer_norm_eps (`float`): epsilon of the layer norms.
        patch_norm (`bool`): layer norm between the first convolution and the groups.
        use_absolute_embeddings (`bool`): learned position embedding; images may then be at most `image_size` wide and high.
        image_size (`int`): side of the input that absolute embeddings are made for; nothing else depends on it.
        upscale (`int`): scale of the output: a power of two (1 restores at the same size) or 3.
        img_range (`float`): factor on the pixel values inside the network.
        upsampler (`str`): kind of reconstruction; `"pixelshuffle"` is the only one.
        resi_connection (`str`): `"1conv"`, a 3x3 convolution before residual additions, or `"identity"`.
        loss_type (`str`): `"l1"` or `"l2"`, the distance between reconstruction and labels.
        initializer_range (`float`): standard deviation of the initial linear weights and position tables.
    """

    attribute_map = {"hidden_size": "embed_dim"}
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    # qk_scale 0 means the default, as in the official code.
    ranges = {"upscale": SIZE, "img_range": POSITIVE, "qk_scale": Range(at_least=0)}

    num_channels: int = 3
    embed_dim: int = 180
    depths: list[int] | tuple[int, ...] = field(default_factory=lambda: [6] * 6)
    num_heads: list[int] | tuple[int, ...] = field(default_factory=lambda: [6] * 6)
    window_size: int = 16
    mlp_ratio: float | int = 2.0
    qkv_bias: bool = True
    qk_scale: float | int | None = None
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    patch_norm: bool = True
    use_absolute_embeddings: bool = False
    image_size: int = 64
    upscale: int = 4
    img_range: float | int = 1.0
    upsampler: str | None = "pixelshuffle"
    resi_connection: Literal["1conv", "identity"] = "1conv"
    loss_type: Literal["l1", "l2"] = "l1"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.num_hidden_layers = len(self.depths)
        super().__post_init__(**kwargs)

    def validate_shell(self):
        """Part of the validation that `@strict` runs."""
        if self.upsampler != "pixelshuffle":
            raise ValueError(
                f"upsampler={self.upsampler!r} is not supported; the only one is 'pixelshuffle', which with upscale=1 "
                "keeps the size."
            )
        if self.upscale & (self.upscale - 1) and self.upscale != 3:
            raise ValueError(f"upscale must be a power of two (1, 2, 4, 8...) or 3, got {self.upscale}.")
        if self.use_absolute_embeddings and self.image_size % self.window_size:
            raise ValueError(
                f"With use_absolute_embeddings, image_size ({self.image_size}) must be a multiple of window_size "
                f"({self.window_size}), to which images are padded."
            )
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths and num_heads must have one entry for each residual group, got {list(self.depths)} and "
                f"{list(self.num_heads)}."
            )
        for num_heads in self.num_heads:
            if self.embed_dim % num_heads:
                raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads, got {num_heads}.")


__all__ = ["ImageRestorationConfig"]
