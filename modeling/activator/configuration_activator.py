# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Activator models."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.patch_mixer.configuration import PatchMixerConfig


@strict
class ActivatorConfig(PatchMixerConfig):
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
    variants = {
        "activator_cifar10": {"num_labels": 10},
        "activator_geglu_only_cifar10": {"num_labels": 10, "use_mlp": False, "hidden_dropout_prob": 0.0},
    }

    use_mlp: bool = True


__all__ = ["ActivatorConfig"]
