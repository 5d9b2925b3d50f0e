# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the auto-encoder of attention patterns."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_attn.architectures.ranges import FINITE, POSITIVE, SIZE, Range
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


@strict
class VitPatternAutoencoderConfig(HubConfigMixin, VariantsMixin, PreTrainedConfig):
    r"""Configuration of a [`VitPatternAutoencoder`] (after arXiv 2303.13731). The defaults are for ViT-B/16.

    Args:
        num_patches (`int`): patches of an image, without prefix tokens; a map is `num_patches` x `num_patches`.
        hidden_sizes (`list[int]`): channels of the convolutions, each of which halves the map.
        latent_size (`int`): numbers that summarise a map.
        map_mean (`float`): mean of the maps after scaling; [`~VitPatternAutoencoder.fit`] sets it.
        map_std (`float`): standard deviation of the maps after scaling; [`~VitPatternAutoencoder.fit`] sets it.
        initializer_range (`float`): standard deviation of the initial weights, relative to that which keeps the variance
            of a ReLU network.
    """

    model_type = "vit_pattern_autoencoder"
    variants = {"vit_base_patch16_224": {}, "vit_base_patch32_224": {"num_patches": 49}}
    tiny = {"num_patches": 12, "hidden_sizes": [4, 6], "latent_size": 5}
    ranges = {
        "num_patches": SIZE,
        "hidden_sizes": Range(at_least=1),
        "latent_size": SIZE,
        "map_mean": FINITE,
        "map_std": POSITIVE,
    }

    num_patches: int = 196
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    latent_size: int = 16
    map_mean: float | int = 0.0
    map_std: float | int = 1.0
    initializer_range: float | int = 1.0

    def validate_sizes(self):
        """Part of the validation that `@strict` runs."""
        if not self.hidden_sizes:
            raise ValueError("hidden_sizes must have at least one entry (one per convolution).")
        if self.num_patches < 2 ** len(self.hidden_sizes):
            raise ValueError(
                f"A map of {self.num_patches} patches cannot be halved {len(self.hidden_sizes)} times: shorten "
                f"hidden_sizes, or use at least {2 ** len(self.hidden_sizes)} patches."
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of the map before the first convolution and after each."""
        return tuple(self.num_patches // 2**halvings for halvings in range(len(self.hidden_sizes) + 1))


__all__ = ["VitPatternAutoencoderConfig"]
