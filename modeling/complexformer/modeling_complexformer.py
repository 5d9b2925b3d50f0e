# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Causal language models with complex multi-head attention (arXiv 2505.10222, withdrawn)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
)

from .configuration_complexformer import ComplexFormerConfig


#: added to squared magnitudes
EPSILON = 1e-9


def turn(states: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Scale the angles of complex numbers, `|x| exp(i (delta * angle(x) + bias))`.

    Args:
        states: `(batch, heads, length, head_dim)`, float32; real parts in the first half, imaginary ones in the second.
        delta: `(heads, head_dim / 2)`.
        bias: the same shape, or `None` for 0.

    Returns:
        States of the same shape. A zero has the angle 0, and no gradient through its angle.
    """
    real, imaginary = states.chunk(2, dim=-1)
    magnitude = (real.square() + imaginary.square() + EPSILON).sqrt()
    is_zero = (real == 0) & (imaginary == 0)
    angle = torch.atan2(imaginary, real.masked_fill(is_zero, 1.0)) * delta[:, None]
    if bias is not None:
        angle = angle + bias[:, None]
    return torch.cat((magnitude * angle.cos(), magnitude * angle.sin()), dim=-1)


class ComplexFormerAttention(DecoderAttention):
    """Attention whose scores are sums of cosines over pairs of channels,

        |q| |k| cos(delta * (angle(q) - angle(k)) + bias + (m - n) * frequency)

    The cosine of a difference splits, so that queries and keys are turned once, by their own angles and then by their
    positions as in rotary embeddings, and any attention function and cache does the rest. `delta` belongs to the heads of
    the keys, which queries of a group share; `bias` to those of the queries.
    """

    def __init__(self, config: ComplexFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = config.score_scale
        pairs = self.head_dim // 2
        self.delta_params = nn.Parameter(torch.empty(config.num_key_value_heads, pairs))
        self.bias_params = nn.Parameter(torch.empty(config.num_attention_heads, pairs))

    def queries_and_keys(self, hidden_states, position_embeddings):
        queries, keys = super().queries_and_keys(hidden_states, None)
        # Angles grow with the position, and narrower types would round them.
        delta, bias = self.delta_params.float(), self.bias_params.float()
        turned = (
            turn(queries.float(), delta.repeat_interleave(self.num_key_value_groups, dim=0), bias),
            turn(keys.float(), delta),
        )
        turned = apply_rotary_pos_emb(*turned, *position_embeddings)
        return turned[0].to(queries.dtype), turned[1].to(keys.dtype)


class ComplexFormerRoundedRotaryEmbedding(LlamaRotaryEmbedding):
    """Positions whose frequencies are rounded to bfloat16."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.inv_freq.to(torch.bfloat16).float()
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def make_rotary_embedding(config: ComplexFormerConfig) -> nn.Module:
    """What gives cosines and sines of the positions."""
    rounded = config.frequency_rounding is not None
    return (ComplexFormerRoundedRotaryEmbedding if rounded else LlamaRotaryEmbedding)(config=config)


class ComplexFormerDecoderLayer(DecoderLayer):
    def make_mixer(self, config: ComplexFormerConfig, layer_idx: int) -> ComplexFormerAttention:
        return ComplexFormerAttention(config, layer_idx)


class ComplexFormerPreTrainedModel(DecoderPreTrainedModel):
    config: ComplexFormerConfig
    layer_class = ComplexFormerDecoderLayer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ComplexFormerAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.xavier_uniform_(projection.weight)
            init.normal_(module.delta_params, mean=0.0, std=module.delta_params.shape[-1] ** -0.5)
            init.zeros_(module.bias_params)


class ComplexFormerModel(ComplexFormerPreTrainedModel, DecoderModel):
    """The decoder without a head."""

    def make_rotary_embedding(self, config: ComplexFormerConfig) -> nn.Module:
        return make_rotary_embedding(config)

    def layer_arguments(self, hidden_states, position_ids, past_length) -> dict:
        return super().layer_arguments(hidden_states.float(), position_ids, past_length)


class ComplexFormerForCausalLM(FromLlamaMixin, ComplexFormerPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head."""

    model_class = ComplexFormerModel

    @classmethod
    def config_from_base(cls, base_config, **overrides):
        config = super().config_from_base(base_config, **overrides)
        if base_config.model_type != config.model_type and "score_scale" not in overrides:
            config.score_scale = config.head_dim**-0.5
        return config

    @classmethod
    def new_to_base(cls, name: str, config: ComplexFormerConfig) -> bool:
        return name.endswith((".delta_params", ".bias_params"))

    @classmethod
    def from_base(cls, base, dtype=None, **overrides):
        """Make a model from a pretrained one; see [`~hf_attn.checkpoints.from_base.FromBaseMixin.from_base`].

        `delta` is 1 and `bias` is 0 where the base has none, which is rotary attention: the model computes what its base
        computes, until it is trained.
        """
        model = super().from_base(base, dtype=dtype, **overrides)
        new = set(model.base_report.new)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in new:
                    parameter.fill_(1.0 if name.endswith(".delta_params") else 0.0)
        return model


__all__ = ["ComplexFormerForCausalLM", "ComplexFormerModel", "ComplexFormerPreTrainedModel"]
