# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The part of a configuration that NiNformer and Activator have in common."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.hub import HubConfigMixin

from ..imaging import ImagePreprocessingMixin
from ..variants import VariantsMixin


@strict
class PatchMixerConfig(HubConfigMixin, VariantsMixin, ImagePreprocessingMixin, PreTrainedConfig):
    r"""Configuration of an image model of patches and blocks; the defaults are those of the papers' CIFAR-10 models.

    Args:
        image_size (`int`): side of the square images in pixels.
        patch_size (`int`): side of a patch in pixels.
        num_channels (`int`): channels of an image.
        hidden_size (`int`): width of a token.
        intermediate_size (`int`): hidden width of the feed-forward networks.
        num_hidden_layers (`int`): number of blocks.
        hidden_act (`str`): activation of the feed-forward networks.
        hidden_dropout_prob (`float`): dropout inside the feed-forward networks.
        layer_norm_eps (`float`): epsilon of the layer norms.
    """

    crop_ratio = None
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
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

    def validate_image_size(self):
        """Part of the validation that `@strict` runs."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}."
            )


__all__ = ["PatchMixerConfig"]
