# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the NiNformer models."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.patch_mixer.configuration import PatchMixerConfig


@strict
class NiNformerConfig(PatchMixerConfig):
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
    variants = {"ninformer_cifar10": {"num_labels": 10}}

    @property
    def num_tokens(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


__all__ = ["NiNformerConfig"]
