# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the vision transformers with sigma-reparametrised linear maps."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from hf_attn.architectures.imaging import ImagePreprocessingMixin, PublishedClassesMixin
from hf_attn.architectures.ranges import POSITIVE
from hf_attn.hub import HubConfigMixin


@strict
class SigmaReparamViTConfig(HubConfigMixin, ImagePreprocessingMixin, PublishedClassesMixin, ViTConfig):
    r"""Configuration of a [`SigmaReparamViTForImageClassification`]; the defaults are ViT-B/16.

    Args:
        use_layer_norm (`bool`): keep the LayerNorms of ViT; the paper's ViT has none, the last included.
        initializer_range (`float`): standard deviation of the initial weights. 0.02 is meant for the published widths; a
            narrow model without LayerNorm needs more, about `hidden_size ** -0.5`, or its signal dies out and it does
            not learn.
        reparametrised (`bool`): whether the maps are reparametrised; not after `fold_sigma_reparam`.
        spectral_init (`str`): `"preserve"` starts every map as the plain one, gamma = sigma(W); `"unit"` at gamma = 1.
        patch_embedding_init_multiplier (`float`): factor of `initializer_range` for the patch embedding; 0.125 for ViT-L
            and larger.
        use_class_token (`bool`): a token besides those of the patches.
        pooling (`str`): input of the classifier: `"token"`, the class token, or `"mean"`, the mean of the patches.
        drop_path_rate (`float`): rate of stochastic depth at the last layer; it grows linearly from 0.

    The other arguments are those of [`~transformers.ViTConfig`].
    """

    model_type = "sigma_reparam_vit"
    variants = {
        "vit_base_patch16_224": {"drop_path_rate": 0.1, "num_labels": 1000},
        "vit_large_patch16_224": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_embedding_init_multiplier": 0.125,
            "drop_path_rate": 0.2,
            "num_labels": 1000,
        },
    }

    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ranges = {"patch_embedding_init_multiplier": POSITIVE}

    layer_norm_eps: float = 1e-6
    use_layer_norm: bool = False
    reparametrised: bool = True
    spectral_init: Literal["preserve", "unit"] = "preserve"
    patch_embedding_init_multiplier: float | int = 1.0
    drop_path_rate: float | int = 0.0
    use_class_token: bool = True
    pooling: Literal["token", "mean"] = "token"

    def validate_pooling(self):
        """Part of the validation that `@strict` runs."""
        if self.pooling == "token" and not self.use_class_token:
            raise ValueError("pooling='token' needs the class token: set use_class_token=True or pooling='mean'.")


__all__ = ["SigmaReparamViTConfig"]
