# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Causal language models with sigmoid attention (arXiv 2409.04431)."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.attention.family import OwnAttentionMixin
from hf_attn.attention.sigmoid import SIGMOID, alibi_slopes, sigmoid_attention_eager
from hf_attn.hub import HubModelMixin

from .configuration_sigmoid_attention import SigmoidAttentionConfig


NORMS = {"rms_norm": LlamaRMSNorm, "layer_norm": nn.LayerNorm}


class SigmoidAttentionLayerScale(nn.Module):
    def __init__(self, config: SigmoidAttentionConfig):
        super().__init__()
        self.initial_value = config.layer_scale_init_value
        self.weight = nn.Parameter(torch.full((config.hidden_size,), self.initial_value))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class SigmoidAttentionMLP(nn.Module):
    def __init__(self, config: SigmoidAttentionConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


# `attn_implementation="eager"` is the registered specification: it takes the additive masks of "eager" as well.
eager_attention_forward = SIGMOID.attention_function("sigmoid_eager")


class SigmoidAttention(nn.Module):
    """Multi-head sigmoid attention with query/key norms; everything about the weights is in `hf_attn.attention.sigmoid`."""

    def __init__(self, config: SigmoidAttentionConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 * math.exp(config.attention_log_temperature)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        norm = NORMS[config.norm_type] if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.norm_eps)
        self.k_norm = norm(self.head_dim, eps=config.norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if not self.config.qk_norm_after_rope:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if self.config.qk_norm_after_rope:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


class SigmoidAttentionDecoderLayer(GradientCheckpointingLayer):
    """x + scale(post_norm(f(norm(x)))) for attention and feed-forward; the post-norms are those of "hybridnorm"."""

    def __init__(self, config: SigmoidAttentionConfig, layer_idx: int):
        super().__init__()
        norm = NORMS[config.norm_type]
        post_norm = norm if config.norm_structure == "hybridnorm" else nn.Identity
        self.input_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SigmoidAttention(config, layer_idx)
        self.post_attention_layernorm = post_norm(config.hidden_size, eps=config.norm_eps)
        self.pre_feedforward_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = LlamaMLP(config) if config.gated_mlp else SigmoidAttentionMLP(config)
        self.post_feedforward_layernorm = post_norm(config.hidden_size, eps=config.norm_eps)
        scaled = config.layer_scale_init_value is not None
        self.attention_scale = SigmoidAttentionLayerScale(config) if scaled else nn.Identity()
        self.mlp_scale = SigmoidAttentionLayerScale(config) if scaled else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + self.attention_scale(self.post_attention_layernorm(hidden_states))

        residual = hidden_states
        hidden_states = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return residual + self.mlp_scale(self.post_feedforward_layernorm(hidden_states))


class SigmoidAttentionPreTrainedModel(HubModelMixin, OwnAttentionMixin, PreTrainedModel):
    config: SigmoidAttentionConfig
    base_model_prefix = "model"
    attention_mechanism = SIGMOID
    supports_gradient_checkpointing = True
    _no_split_modules = ["SigmoidAttentionDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SigmoidAttentionDecoderLayer, "attentions": SigmoidAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SigmoidAttentionLayerScale):
            init.constant_(module.weight, module.initial_value)
        elif self.config.initializer_range is None and isinstance(module, nn.Linear | nn.Embedding):
            # 1 / sqrt(fan_in); for the (tied) embedding that is the width, the last dimension as well
            init.normal_(module.weight, mean=0.0, std=module.weight.shape[-1] ** -0.5)


class SigmoidAttentionModel(SigmoidAttentionPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: SigmoidAttentionConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [SigmoidAttentionDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.final_norm_eps)
        if config.position_embedding_type == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `(batch, sequence)`; either these or `inputs_embeds` `(batch, sequence, hidden_size)`.
            attention_mask: `(batch, past + sequence)`, 1 for tokens and 0 for padding, or 4-D.
            position_ids: `(batch, sequence)`, for "rope" and "sincos"; ALiBi counts the places between tokens.
            past_key_values: cache of the earlier tokens.
            use_cache: whether to return a cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        segment_function = None
        if self.config.separate_trailing_padding and attention_mask is None and input_ids is not None:
            segment_function = self._trailing_padding_segments(input_ids, past_seen_tokens)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=segment_function,
        )

        hidden_states = inputs_embeds
        position_type = self.config.position_embedding_type
        if position_type == "sincos":
            hidden_states = hidden_states + self._sincos_embedding(position_ids).to(hidden_states.dtype)
        elif position_type == "rope":
            kwargs["position_embeddings"] = self.rotary_emb(hidden_states, position_ids=position_ids)
        elif position_type == "alibi":
            slopes = alibi_slopes(self.config.num_attention_heads).to(hidden_states.device)
            kwargs["alibi_slopes"] = slopes * math.exp(self.config.attention_log_temperature)
            # A static cache returns its own counter, which every layer increases in place before it attends.
            is_counter = isinstance(past_seen_tokens, torch.Tensor)
            kwargs["query_offset"] = past_seen_tokens.clone() if is_counter else past_seen_tokens

        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _sincos_embedding(self, position_ids: torch.Tensor) -> torch.Tensor:
        width = self.config.hidden_size
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=position_ids.device) / width)
        angles = position_ids[..., None] * frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

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


class SigmoidAttentionForCausalLM(SigmoidAttentionPreTrainedModel, GenerationMixin):
    """The decoder with a (tied) language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SigmoidAttentionConfig):
        super().__init__(config)
        self.model = SigmoidAttentionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            labels: `(batch, sequence)`, the input ids with -100 where no loss is wanted; they are shifted inside.
            logits_to_keep: number of last positions (or their indices) for which logits are computed, 0 for all.

        The other arguments are those of [`SigmoidAttentionModel.forward`].
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SigmoidCrossAttention(nn.Module):
    """Sigmoid attention from one stream of tokens to another; the values are normalised in each head.

    Args:
        query_dim: width of the stream that asks.
        key_value_dim: width of the stream that is read; the heads of both must have the same width.
        num_heads: number of heads.
        sigmoid_bias: constant added to the logits, naturally `-log(keys at training)`.
        log_temperature: the logits (not the bias) are multiplied by the exponential of this.
        qk_norm: whether queries and keys are normalised in each head as well.
        use_bias: biases in the projections.
        rope_theta: base of the rotary positions of queries and keys, each stream counting from 0 whatever the mask;
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
                f"num_heads={num_heads}; make the dimensions equal and a multiple of num_heads."
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
            query, key, value, scaling=self.scaling, bias=self.sigmoid_bias, attention_mask=mask
        )
        return self.o_proj(output.transpose(1, 2).flatten(-2)), weights


__all__ = [
    "SigmoidAttentionForCausalLM",
    "SigmoidAttentionModel",
    "SigmoidAttentionPreTrainedModel",
    "SigmoidCrossAttention",
]
