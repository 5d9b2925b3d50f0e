# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Activator models."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.imaging import ImagePreprocessingMixin
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


@strict
class ActivatorConfig(HubConfigMixin, VariantsMixin, ImagePreprocessingMixin, PreTrainedConfig):
    r"""Configuration of an [`ActivatorForImageClassification`] (arXiv 2405.15953). The defaults are those of the paper's
    CIFAR-10 model with an MLP.

    Args:
        image_size (`int`): side that the image processor resizes to. The model takes any sides that are multiples of
            `patch_size`.
        patch_size (`int`): side of a patch in pixels.
        num_channels (`int`): channels of an image.
        hidden_size (`int`): width of a token.
        intermediate_size (`int`): hidden width of the gating unit and of the feed-forward network.
        num_hidden_layers (`int`): number of blocks.
        use_mlp (`bool`): whether a block has a feed-forward network after its gating unit.
        hidden_act (`str`): activation of the gating unit and of the feed-forward network: `"gelu"` in the paper's code;
            `"silu"` (SwiGLU) and `"relu"` (ReGLU) are options of ours.
        hidden_dropout_prob (`float`): dropout inside the feed-forward network; the gating unit has none, so it does
            nothing without `use_mlp`.
        layer_norm_eps (`float`): epsilon of the layer norms.
    """

    model_type = "activator"
    crop_ratio = None
    variants = {
        "activator_cifar10": {"num_labels": 10},
        "activator_geglu_only_cifar10": {"num_labels": 10, "use_mlp": False, "hidden_dropout_prob": 0.0},
    }

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
    use_mlp: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.5
    layer_norm_eps: float = 1e-5

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


__all__ = ["ActivatorConfig"]
