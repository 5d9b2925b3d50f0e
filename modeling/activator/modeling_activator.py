# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Activator (arXiv 2405.15953): gated linear units in place of attention.

    unit:   u = LN_h(GELU(W1 n));  v = LN_h(W2 n), with one and the same norm;  W3 (u * v)
    block:  y = x + unit(norm(x));  out = y + FFN(norm(y)), with one and the same norm, or y without the FFN

Nothing in it mixes tokens: a patch is processed alone until the mean over all of them, so the order of the patches has
no influence.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.architectures.patch_mixer.modeling import (
    FeedForward,
    PatchClassifierMixin,
    PatchModelMixin,
    PatchPreTrainedModel,
)

from .configuration_activator import ActivatorConfig


class ActivatorGatingUnit(nn.Module):
    """Gated linear unit whose halves are both normalised, the first one after its activation."""

    def __init__(self, config: ActivatorConfig):
        super().__init__()
        self.proj_1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.proj_2 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.proj_3 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, tokens, hidden_size)` -> the same shape, and the gate `(batch, tokens, intermediate_size)`."""
        gate = self.norm(self.activation_fn(self.proj_1(hidden_states))) * self.norm(self.proj_2(hidden_states))
        return self.proj_3(gate), gate


class ActivatorLayer(GradientCheckpointingLayer):
    """Gating unit and, with `use_mlp`, feed-forward network, each with a residual and both after the same norm."""

    def __init__(self, config: ActivatorConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gating_unit = ActivatorGatingUnit(config)
        self.mlp = FeedForward(config) if config.use_mlp else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` -> the same shape."""
        gated, _ = self.gating_unit(self.norm(hidden_states))
        hidden_states = hidden_states + gated
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.norm(hidden_states))
        return hidden_states


class ActivatorPreTrainedModel(PatchPreTrainedModel):
    """Base of the Activator models."""

    config: ActivatorConfig
    base_model_prefix = "activator"
    _no_split_modules = ["ActivatorLayer"]
    _can_record_outputs = {"hidden_states": ActivatorLayer, "gates": ActivatorGatingUnit}


class ActivatorModel(PatchModelMixin, ActivatorPreTrainedModel):
    """Activator without a head."""

    layer_class = ActivatorLayer


class ActivatorForImageClassification(PatchClassifierMixin, ActivatorPreTrainedModel):
    """Activator with a linear classifier on the mean of its tokens."""

    body_class = ActivatorModel


__all__ = ["ActivatorForImageClassification", "ActivatorModel", "ActivatorPreTrainedModel"]
