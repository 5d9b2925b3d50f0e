# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""NiNformer (arXiv 2403.02411): an MLP-Mixer inside each block makes the gate of a linear unit.

    block:  n = norm(x);  y = x + (W n + b) * Mixer(n);  out = y + FFN(norm(y)), with one and the same norm
    Mixer:  t = n + FFN_tokens(norm_a(n)^T)^T;  gate = t + FFN_channels(norm_b(t))

The gate is used as it is, without a squashing function.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.architectures.patch_mixer.modeling import (
    FeedForward,
    PatchClassifierMixin,
    PatchEmbeddings,
    PatchModelMixin,
    PatchPreTrainedModel,
)

from .configuration_ninformer import NiNformerConfig


class NiNformerPatchEmbeddings(PatchEmbeddings):
    """Patches of images of the one size that the token mixing has been built for."""

    def __init__(self, config: NiNformerConfig):
        super().__init__(config)
        self.image_size = config.image_size

    def check_size(self, height: int, width: int) -> None:
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                "NiNformer needs a fixed number of tokens: this model takes images of "
                f"{self.image_size}x{self.image_size} pixels, got {height}x{width}. Resize the images, for example "
                "with the image processor."
            )


class NiNformerMixer(nn.Module):
    """The network inside: an MLP-Mixer block whose output is the gate."""

    def __init__(self, config: NiNformerConfig):
        super().__init__()
        self.token_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.token_mlp = FeedForward(config, width=config.num_tokens)
        self.channel_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.channel_mlp = FeedForward(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` -> gate of the same shape."""
        mixed = self.token_mlp(self.token_norm(hidden_states).transpose(1, 2)).transpose(1, 2)
        hidden_states = hidden_states + mixed
        return hidden_states + self.channel_mlp(self.channel_norm(hidden_states))


class NiNformerGatingUnit(nn.Module):
    """A linear projection, gated by the mixer."""

    def __init__(self, config: NiNformerConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.mixer = NiNformerMixer(config)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, tokens, hidden_size)` -> gated projection and gate, each of the same shape."""
        gate = self.mixer(hidden_states)
        return self.proj(hidden_states) * gate, gate


class NiNformerLayer(GradientCheckpointingLayer):
    """Gating unit and feed-forward network, each with a residual and both after the same norm."""

    def __init__(self, config: NiNformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gating_unit = NiNformerGatingUnit(config)
        self.mlp = FeedForward(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` -> the same shape."""
        gated, _ = self.gating_unit(self.norm(hidden_states))
        hidden_states = hidden_states + gated
        return hidden_states + self.mlp(self.norm(hidden_states))


class NiNformerPreTrainedModel(PatchPreTrainedModel):
    """Base of the NiNformer models."""

    config: NiNformerConfig
    base_model_prefix = "ninformer"
    _no_split_modules = ["NiNformerLayer"]
    _can_record_outputs = {"hidden_states": NiNformerLayer, "gates": NiNformerGatingUnit}


class NiNformerModel(PatchModelMixin, NiNformerPreTrainedModel):
    """NiNformer without a head."""

    embeddings_class = NiNformerPatchEmbeddings
    layer_class = NiNformerLayer


class NiNformerForImageClassification(PatchClassifierMixin, NiNformerPreTrainedModel):
    """NiNformer with a linear classifier on the mean of its tokens."""

    body_class = NiNformerModel


__all__ = ["NiNformerForImageClassification", "NiNformerModel", "NiNformerPreTrainedModel"]
