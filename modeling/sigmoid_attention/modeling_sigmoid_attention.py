# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Causal language models with sigmoid attention (arXiv 2409.04431)."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    make_norm,
)
from hf_attn.attention.family import OwnAttentionMixin
from hf_attn.attention.sigmoid import SIGMOID, SigmoidCall, alibi_slopes, sigmoid_attention_eager

from .configuration_sigmoid_attention import SigmoidAttentionConfig


class SigmoidAttentionLayerScale(nn.Module):
    def __init__(self, config: SigmoidAttentionConfig):
        super().__init__()
        self.initial_value = config.layer_scale_init_value
        self.weight = nn.Parameter(torch.full((config.hidden_size,), self.initial_value))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class SigmoidAttention(DecoderAttention):
    """Multi-head sigmoid attention with query/key norms; everything about the weights is in `hf_attn.attention.sigmoid`."""

    # The registered specification: it takes the additive masks of "eager" as well.
    eager_attention_forward = staticmethod(SIGMOID.attention_function("sigmoid_eager"))

    def __init__(self, config: SigmoidAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling *= math.exp(config.attention_log_temperature)

    def queries_and_keys(self, hidden_states, position_embeddings):
        if position_embeddings is None or not (self.config.qk_norm and self.config.qk_norm_after_rope):
            return super().queries_and_keys(hidden_states, position_embeddings)
        query_states, key_states = self.heads(self.q_proj, hidden_states), self.heads(self.k_proj, hidden_states)
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        return self.q_norm(query_states), self.k_norm(key_states)


class SigmoidAttentionDecoderLayer(DecoderLayer):
    """x + scale(post_norm(f(norm(x)))) for attention and feed-forward; the post-norms are those of "hybridnorm"."""

    def __init__(self, config: SigmoidAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hybrid, scaled = config.norm_structure == "hybridnorm", config.layer_scale_init_value is not None
        self.post_attention_layernorm = make_norm(config) if hybrid else nn.Identity()
        self.pre_feedforward_layernorm = make_norm(config)
        self.post_feedforward_layernorm = make_norm(config) if hybrid else nn.Identity()
        self.attention_scale = SigmoidAttentionLayerScale(config) if scaled else nn.Identity()
        self.mlp_scale = SigmoidAttentionLayerScale(config) if scaled else nn.Identity()

    def make_mixer(self, config: SigmoidAttentionConfig, layer_idx: int) -> SigmoidAttention:
        return SigmoidAttention(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + self.attention_scale(self.post_attention_layernorm(hidden_states))

        residual = hidden_states
        hidden_states = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return residual + self.mlp_scale(self.post_feedforward_layernorm(hidden_states))


class SigmoidAttentionPreTrainedModel(OwnAttentionMixin, DecoderPreTrainedModel):
    config: SigmoidAttentionConfig
    attention_mechanism = SIGMOID
    layer_class = SigmoidAttentionDecoderLayer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SigmoidAttentionLayerScale):
            init.constant_(module.weight, module.initial_value)
        elif self.config.initializer_range is None and isinstance(module, nn.Linear | nn.Embedding):
            # 1 / sqrt(fan_in); for the (tied) embedding that is the width, the last dimension as well
            init.normal_(module.weight, mean=0.0, std=module.weight.shape[-1] ** -0.5)


class SigmoidAttentionModel(SigmoidAttentionPreTrainedModel, DecoderModel):
    """The decoder without a head. `position_ids` are for "rope" and "sincos"; ALiBi counts the places between tokens."""

    def make_embedding(self, config: SigmoidAttentionConfig) -> nn.Embedding:
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def make_norm(self, config: SigmoidAttentionConfig) -> nn.Module:
        return make_norm(config, eps=config.final_norm_eps)

    def make_rotary_embedding(self, config: SigmoidAttentionConfig) -> nn.Module | None:
        return super().make_rotary_embedding(config) if config.position_embedding_type == "rope" else None

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.config.position_embedding_type != "sincos":
            return inputs_embeds
        width = self.config.hidden_size
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=position_ids.device) / width)
        angles = position_ids[..., None] * frequencies
        return inputs_embeds + torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(inputs_embeds.dtype)

    def layer_arguments(self, hidden_states, position_ids, past_length) -> dict:
        if self.config.position_embedding_type != "alibi":
            return super().layer_arguments(hidden_states, position_ids, past_length)
        slopes = alibi_slopes(self.config.num_attention_heads).to(hidden_states.device)
        # A static cache returns its own counter, which every layer increases in place before it attends.
        is_counter = isinstance(past_length, torch.Tensor)
        return {
            "alibi_slopes": slopes * math.exp(self.config.attention_log_temperature),
            "query_offset": past_length.clone() if is_counter else past_length,
        }

    def mask_arguments(self, input_ids, attention_mask, past_length) -> dict:
        if not self.config.separate_trailing_padding or attention_mask is not None or input_ids is None:
            return {}
        return {"and_mask_function": self._trailing_padding_segments(input_ids, past_length)}

    def _trailing_padding_segments(self, input_ids: torch.Tensor, past_seen_tokens: int) -> Callable | None:
        if past_seen_tokens != 0 or self.config.pad_token_id is None:
            return None
        is_token = input_ids != self.config.pad_token_id
        is_trailing = ~is_token.flip(-1).cumsum(-1).bool().flip(-1)
        # Without padding the mask can be left out; a compiled graph cannot look.
        if not torch.compiler.is_compiling() and not is_trailing.any():
            return None
        last = input_ids.shape[-1] - 1  # later keys are empty slots of a static cache, which causality hides

        def same_segment(batch_idx, head_idx, q_idx, kv_idx):
            return is_trailing[batch_idx, q_idx] == is_trailing[batch_idx, kv_idx.clamp(max=last)]

        return same_segment


class SigmoidAttentionForCausalLM(SigmoidAttentionPreTrainedModel, DecoderForCausalLM):
    """The decoder with a (tied) language modelling head."""

    model_class = SigmoidAttentionModel


class SigmoidCrossAttention(nn.Module):
    """Sigmoid attention from one stream of tokens to another; the values are normalised in each head.

    Args:
        query_dim: width of the inputs of the query projection.
        key_value_dim: width of the stream that is read; the heads of both must have the same width.
        num_heads: number of heads.
        sigmoid_bias: constant added to the logits, naturally `-log(keys at training)`.
        log_temperature: the logits (not the bias) are multiplied by the exponential of this.
        qk_norm: whether queries and keys are normalised in each head as well.
        use_bias: biases in the projections.
        rope_theta: base of the rotary positions of queries and keys, each stream counting from 0, independent of the mask;
            without one there are no positions.
    """

    def __init__(
        self,
        query_dim: int,
        key_value_dim: int,
        num_heads: int,
        sigmoid_bias: float,
        log_temperature: float = 0.0,
        qk_norm: bool = False,
        use_bias: bool = False,
        rope_theta: float | None = None,
    ):
        super().__init__()
        if query_dim % num_heads != 0 or query_dim != key_value_dim:
            raise ValueError(
                f"Both streams need heads of the same width: got query_dim={query_dim}, key_value_dim={key_value_dim} and "
                f"num_heads={num_heads}. Use equal dimensions that are a multiple of num_heads."
            )
        self.head_dim = query_dim // num_heads
        self.scaling = self.head_dim**-0.5 * math.exp(log_temperature)
        self.sigmoid_bias = sigmoid_bias
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(query_dim, query_dim, bias=use_bias)
        self.k_proj = nn.Linear(key_value_dim, key_value_dim, bias=use_bias)
        self.v_proj = nn.Linear(key_value_dim, key_value_dim, bias=use_bias)
        self.o_proj = nn.Linear(key_value_dim, query_dim, bias=use_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.v_norm = nn.LayerNorm(self.head_dim)

    def _rotate(self, states: torch.Tensor) -> torch.Tensor:
        """Turn `(batch, heads, length, head_dim)` by the positions 0, 1, ..."""
        dims = torch.arange(0, self.head_dim, 2, device=states.device, dtype=torch.float32)
        angles = torch.arange(states.shape[2], device=states.device)[:, None] * self.rope_theta ** (
            -dims / self.head_dim
        )
        angles = torch.cat((angles, angles), dim=-1)
        return states * angles.cos().to(states.dtype) + rotate_half(states) * angles.sin().to(states.dtype)

    def forward(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from `hidden_states` to `key_value_states`.

        Args:
            hidden_states: `(batch, q_len, query_dim)`.
            key_value_states: `(batch, kv_len, key_value_dim)`.
            key_mask: `(batch, kv_len)`, non-zero for the keys that may be read.

        Returns:
            Output `(batch, q_len, query_dim)` and weights `(batch, heads, q_len, kv_len)`.
        """
        query, key, value = (
            norm(projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
            for norm, projection, states in (
                (self.q_norm, self.q_proj, hidden_states),
                (self.k_norm, self.k_proj, key_value_states),
                (self.v_norm, self.v_proj, key_value_states),
            )
        )
        if self.rope_theta is not None:
            query, key = self._rotate(query), self._rotate(key)
        mask = None if key_mask is None else key_mask[:, None, None, :].bool()
        output, weights = sigmoid_attention_eager(
            SigmoidCall(query, key, value, scaling=self.scaling, bias=self.sigmoid_bias, attention_mask=mask)
        )
        return self.o_proj(output.transpose(1, 2).flatten(-2)), weights


__all__ = [
    "SigmoidAttentionForCausalLM",
    "SigmoidAttentionModel",
    "SigmoidAttentionPreTrainedModel",
    "SigmoidCrossAttention",
]
