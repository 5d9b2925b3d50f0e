# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the NiNformer models."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.imaging import ImagePreprocessingMixin
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


@strict
class NiNformerConfig(HubConfigMixin, VariantsMixin, ImagePreprocessingMixin, PreTrainedConfig):
    r"""Configuration of a [`NiNformerForImageClassification`] (arXiv 2403.02411). The defaults are those of the paper's
    CIFAR-10 model.

    Args:
        image_size (`int`): side of the square images in pixels. The weights fit this size only.
        patch_size (`int`): side of a patch in pixels.
        num_channels (`int`): channels of an image.
        hidden_size (`int`): width of a token.
        intermediate_size (`int`): hidden width of all feed-forward networks, also of the one that mixes tokens.
        num_hidden_layers (`int`): number of blocks.
        hidden_act (`str`): activation of the feed-forward networks.
        hidden_dropout_prob (`float`): dropout inside the feed-forward networks.
        layer_norm_eps (`float`): epsilon of the layer norms.
    """

    model_type = "ninformer"
    crop_ratio = None
    variants = {"ninformer_cifar10": {"num_labels": 10}}

    tiny = {
        "image_size": 16,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.1,
    }

    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.5
    layer_norm_eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Mean of each channel that the image processor subtracts."""
        return (0.5,) * self.num_channels

    image_std = image_mean

    def validate_image_size(self):
        """Part of the validation that `@strict` runs."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}."
            )


__all__ = ["NiNformerConfig"]
