# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""EchoAtt (arXiv 2409.14595): a Llama-like model in which some layers reuse the attention map of an earlier layer.

A shared layer has no query and key projections and caches values only:

    layer that owns its map:  A = softmax(Q K^T / sqrt(d) + mask),  output A V
    layer that shares it:     output A V_j, with its own values, output projection, norms and MLP

The map A itself is needed only where it is small, in a step of decoding. Elsewhere a shared layer attends with the queries
and keys of its source and its own values, which is the same function and needs no map in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.base_transfer import FromBaseMixin
from hf_attn.hub import HubModelMixin

from .configuration_echo_att import EchoAttConfig


class AttentionMap(NamedTuple):
    """What a layer hands to the layers that share its map; either form determines the other.

    Attributes:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        weights: `(batch, heads, q_len, kv_len)`, if they were computed.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor | None


class ValueCacheLayer(DynamicLayer):
    """Cache of a layer without keys: they are kept with no width, so that lengths and reordering work as usual."""

    def get_seq_length(self) -> int:
        return self.values.shape[-2] if self.is_initialized and self.values.numel() > 0 else 0


def cache_values(past_key_values: Cache, value_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Add values to the cache of a layer that has no keys, and return all of them."""
    layers = past_key_values.layers
    while len(layers) <= layer_idx and past_key_values.layer_class_to_replicate is not None:
        layers.append(past_key_values.layer_class_to_replicate())
    # A plain dynamic layer measures its length by its keys.
    if type(layers[layer_idx]) is DynamicLayer:
        layers[layer_idx] = ValueCacheLayer()
    return past_key_values.update(value_states[..., :0], value_states, layer_idx)[1]


def apply_attention_weights(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`A V` with grouped values: weights `(batch, heads, q_len, kv_len)`, value `(batch, kv_heads, kv_len, head_dim)`.

    Returns:
        `(batch, q_len, heads, head_dim)`.
    """
    batch, heads, q_len, kv_len = weights.shape
    kv_heads = value.shape[1]
    output = weights.reshape(batch, kv_heads, -1, kv_len) @ value
    return output.view(batch, heads, q_len, -1).transpose(1, 2).contiguous()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention that returns the map before dropout, which is what the other layers share."""
    batch, heads, q_len, head_dim = query.shape
    scores = query.reshape(batch, key.shape[1], -1, head_dim) @ key.transpose(-1, -2) * scaling
    scores = scores.view(batch, heads, q_len, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return apply_attention_weights(dropped, value), weights


class EchoAttAttention(nn.Module):
    """Attention of one layer: with a map of its own, or with the map of the layer that it shares with."""

    def __init__(self, config: EchoAttConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.is_shared = layer_idx in config.shared_layers
        self.is_source = layer_idx in config.attention_source.values()
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        if not self.is_shared:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
            if config.qk_norm:
                self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
                self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        shared_map: AttentionMap | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, AttentionMap]:
        """Attend.

        Args:
            hidden_states: `(batch, sequence, hidden_size)`, normalised.
            position_embeddings: cosines and sines of the rotary embedding.
            shared_map: map of the layer that this one shares with; none for a layer with its own.

        Returns:
            Output, attention weights if they were computed, and the map for the layers that share it.
        """
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if self.is_shared:
            query_states, key_states, attn_weights = shared_map
            if past_key_values is not None:
                value_states = cache_values(past_key_values, value_states, self.layer_idx)
        else:
            query_states, key_states = self._queries_and_keys(hidden_states, hidden_shape, position_embeddings)
            attn_weights = None
            if past_key_values is not None:
                key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        dropout = self.attention_dropout if self.training else 0.0
        if attn_weights is not None:
            dropped = nn.functional.dropout(attn_weights, p=dropout)
            attn_output = apply_attention_weights(dropped, value_states)
        else:
            attn_output, attn_weights = self._attention_interface(query_states)(
                self,
                query_states,
                key_states,
                value_states,
                attention_mask,
                dropout=dropout,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights, AttentionMap(query_states, key_states, attn_weights)

    def _queries_and_keys(self, hidden_states, hidden_shape, position_embeddings):
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        return apply_rotary_pos_emb(query_states.transpose(1, 2), key_states.transpose(1, 2), *position_embeddings)

    def _attention_interface(self, query_states: torch.Tensor) -> Callable:
        implementation = self.config._attn_implementation
        # One row of the map costs less to hand over than to recompute.
        if implementation == "sdpa" and self.is_source and query_states.shape[2] == 1:
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


class EchoAttDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer that takes and returns the attention map; the map is an argument so that checkpointing sees it."""

    def __init__(self, config: EchoAttConfig, layer_idx: int):
        super().__init__()
        self.self_attn = EchoAttAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_map: AttentionMap | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, AttentionMap]:
        residual = hidden_states
        hidden_states, _, attention_map = self.self_attn(
            self.input_layernorm(hidden_states), shared_map=shared_map, **kwargs
        )
        hidden_states = residual + hidden_states
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, attention_map


class EchoAttPreTrainedModel(HubModelMixin, LlamaPreTrainedModel):
    config: EchoAttConfig
    _no_split_modules = ["EchoAttDecoderLayer"]
    _can_record_outputs = {"hidden_states": EchoAttDecoderLayer, "attentions": EchoAttAttention}


class EchoAttModel(EchoAttPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: EchoAttConfig):
        # Not LlamaModel's, which would build its own layers first.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [EchoAttDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        """Run the decoder; the arguments are those of transformers' `LlamaModel.forward`."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        masks = attention_mask
        if not isinstance(masks, dict):
            mask_arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {kind: MASKS[kind](**mask_arguments) for kind in sorted(set(self.config.layer_types))}

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        source = self.config.attention_source
        maps = {}
        for layer_idx, decoder_layer in enumerate(self.layers):
            shared_map = maps.get(source.get(layer_idx))
            hidden_states, attention_map = decoder_layer(
                hidden_states,
                shared_map,
                position_embeddings=position_embeddings,
                attention_mask=masks[self.config.layer_types[layer_idx]],
                past_key_values=past_key_values,
                **kwargs,
            )
            if layer_idx in source.values():
                maps[layer_idx] = attention_map
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class EchoAttForCausalLM(FromBaseMixin, EchoAttPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language modelling head; `from_base` makes one from a Llama-like model."""

    def __init__(self, config: EchoAttConfig):
        # Not LlamaForCausalLM's, which would build a Llama first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = EchoAttModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def dropped_from_base(cls, name: str, config: EchoAttConfig) -> bool:
        parts = name.split(".")
        return (
            parts[:2] == ["model", "layers"]
            and int(parts[2]) in config.shared_layers
            and parts[3:4] == ["self_attn"]
            and parts[4] in ("q_proj", "k_proj", "q_norm", "k_norm")
        )

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> EchoAttConfig:
        """Configuration for a base of type Llama, Mistral, Qwen2, Qwen3 or EchoAtt.

        Raises:
            ValueError: for another architecture.
        """
        adapt = BASES.get(base_config.model_type)
        if adapt is None:
            raise ValueError(
                f"EchoAtt cannot be made from a {base_config.model_type!r} model. Supported bases: {', '.join(BASES)}."
            )
        fields = EchoAttConfig.__dataclass_fields__
        values = {name: value for name, value in base_config.to_dict().items() if name in fields}
        for name in ("architectures", "model_type", "transformers_version"):
            values.pop(name, None)
        if "shared_layers" in overrides:
            values.pop("shared_source", None)
        return EchoAttConfig(**{**values, **adapt(base_config), **overrides})


def _plain(base_config) -> dict:
    return {}


def _mistral(base_config) -> dict:
    return {"attention_bias": False, "layer_types": None}


def _qwen2(base_config) -> dict:
    return {"attention_bias": True, "attention_output_bias": False}


def _qwen3(base_config) -> dict:
    return {"qk_norm": True}


#: model type of a base -> fields in which its layers differ from Llama's
BASES = {"llama": _plain, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "echo_att": _plain}


__all__ = ["EchoAttForCausalLM", "EchoAttModel", "EchoAttPreTrainedModel"]
