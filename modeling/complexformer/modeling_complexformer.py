# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Causal language models with complex multi-head attention (arXiv 2505.10222, withdrawn)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
)

from .configuration_complexformer import ComplexFormerConfig
from .turn import turn


def position_angles(
    rotary_emb: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Angles of positions, in float32 at least and up to whole turns, and the factor that some rotary embeddings have.

    Args:
        rotary_emb: gives cosines and sines of the positions.
        hidden_states: determines the device.
        position_ids: `(batch or 1, length)`.

    Returns:
        `(batch or 1, 1, length, head_dim / 2)`, and the factor.
    """
    hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    cosine, sine = (table.chunk(2, dim=-1)[0] for table in rotary_emb(hidden_states, position_ids=position_ids))
    return torch.atan2(sine, cosine)[:, None], rotary_emb.attention_scaling


class ComplexFormerAttention(DecoderAttention):
    """Attention whose scores are sums of cosines over pairs of channels,

        |q| |k| cos(delta * (angle(q) - angle(k)) + bias + (m - n) * frequency)

    The cosine of a difference separates, so queries and keys are rotated once, by their own angles and then by their
    positions as in rotary embeddings, and every attention function and cache can be used. `delta` belongs to the heads of
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
        angles, factor = position_embeddings
        delta, bias = self.delta_params[:, None], self.bias_params[:, None]
        groups = (-1, self.num_key_value_groups)
        queries = turn(queries.unflatten(1, groups), delta[:, None], bias.unflatten(0, groups), angles[:, None])
        queries, keys = queries.flatten(1, 2), turn(keys, delta, None, angles)
        return (queries, keys) if factor == 1.0 else (queries * factor, keys * factor)


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
        return {"position_embeddings": position_angles(self.rotary_emb, hidden_states, position_ids)}


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
