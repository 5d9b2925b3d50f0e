# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""EchoAtt (arXiv 2409.14595): a Llama-like model in which some layers reuse the attention map of an earlier layer.

A shared layer has no query and key projections and caches values only:

    layer that owns its map:  A = softmax(Q K^T / sqrt(d) + mask),  output A V
    layer that shares it:     output A V_j, with its own values, output projection, norms and MLP

Handing over A saves the most work where A is small: in a step of decoding and in training on short sequences. Elsewhere a
shared layer attends with the queries and keys of its source and its own values, which is the same function and needs no map in
memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
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

from hf_attn.checkpoints.from_base import FromBaseMixin
from hf_attn.hub import HubModelMixin

from .configuration_echo_att import EchoAttConfig


if TYPE_CHECKING:
    from hf_attn.analysis import AttentionSimilarity


#: Largest map (queries times keys) that the `sdpa` implementation hands over in training. The layer that computes it pays
#: for not being fused, in memory traffic that grows with the map; each layer that reuses it saves about half of its
#: attention. In a forward pass without a backward only a single row, in decoding, is worth it (measured on a CPU).
MAX_SHARED_MAP = 256 * 256


class ValueCacheLayer(DynamicLayer):
    """Cache of a layer without keys: `keys` has no width, so that lengths and reordering work as usual."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self.keys = self.values[..., :0]
        return self.keys, self.values

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
    """`A V` without repeating the values of a group.

    Args:
        weights: `(batch, heads, q_len, kv_len)`.
        value: `(batch, kv_heads, kv_len or more, head_dim)`; what is beyond `kv_len` are unused slots of a static cache.

    Returns:
        `(batch, q_len, heads, head_dim)`.
    """
    batch, heads, q_len, kv_len = weights.shape
    value = value[:, :, :kv_len]
    output = weights.reshape(batch, value.shape[1], -1, kv_len) @ value
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
    """Softmax attention that returns the map before dropout, which is what the other layers share.

    Takes the masks of both `eager` (additive) and `sdpa` (boolean, or none for plain causality).
    """
    batch, heads, q_len, head_dim = query.shape
    if attention_mask is None and q_len > 1:
        key = key[:, :, :q_len]
        attention_mask = torch.ones(q_len, q_len, dtype=torch.bool, device=query.device).tril()
    scores = query.reshape(batch, key.shape[1], -1, head_dim) @ key.transpose(-1, -2) * scaling
    scores = scores.view(batch, heads, q_len, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout)
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
        self.source_idx = config.attention_source.get(layer_idx)
        self.is_source = layer_idx in config.attention_source.values()
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        query_size, key_value_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        if self.source_idx is None:
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
        shared_query: torch.Tensor | None = None,
        shared_key: torch.Tensor | None = None,
        shared_weights: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            hidden_states: `(batch, sequence, hidden_size)`, normalised.
            position_embeddings: cosines and sines of the rotary embedding.
            shared_query, shared_key, shared_weights: queries `(batch, heads, q_len, head_dim)`, keys
                `(batch, kv_heads, kv_len, head_dim)` and, if they were computed, weights `(batch, heads, q_len, kv_len)`
                of the layer that this one shares with; none for a layer with a map of its own.

        Returns:
            Output `(batch, sequence, hidden_size)`, and weights (if they were computed), queries and keys for the layers
            that share them.
        """
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if self.source_idx is not None:
            query_states, key_states, attn_weights = shared_query, shared_key, shared_weights
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
            attn_output, attn_weights = self._attention_interface(query_states, key_states)(
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
        return attn_output, attn_weights, query_states, key_states

    def _queries_and_keys(self, hidden_states, hidden_shape, position_embeddings):
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        return apply_rotary_pos_emb(query_states.transpose(1, 2), key_states.transpose(1, 2), *position_embeddings)

    def _attention_interface(self, query_states: torch.Tensor, key_states: torch.Tensor) -> Callable:
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and self.is_source:
            queries, keys = query_states.shape[2], key_states.shape[2]
            if queries == 1 or (self.training and queries * keys <= MAX_SHARED_MAP):
                return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


class EchoAttDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer that takes and returns an attention map, as plain tensors so that every checkpointing sees them."""

    def __init__(self, config: EchoAttConfig, layer_idx: int):
        super().__init__()
        self.self_attn = EchoAttAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_query: torch.Tensor | None = None,
        shared_key: torch.Tensor | None = None,
        shared_weights: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Returns the hidden states and, if other layers share them, queries, keys and weights."""
        residual = hidden_states
        hidden_states, weights, query, key = self.self_attn(
            self.input_layernorm(hidden_states),
            shared_query=shared_query,
            shared_key=shared_key,
            shared_weights=shared_weights,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if self.self_attn.is_source:
            return hidden_states, query, key, weights
        return hidden_states, None, None, None


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
        maps = {}
        for layer_idx, decoder_layer in enumerate(self.layers):
            hidden_states, *attention_map = decoder_layer(
                hidden_states,
                *maps.get(decoder_layer.self_attn.source_idx, (None, None, None)),
                position_embeddings=position_embeddings,
                attention_mask=masks[self.config.layer_types[layer_idx]],
                past_key_values=past_key_values,
                **kwargs,
            )
            if decoder_layer.self_attn.is_source:
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
    def from_base(
        cls,
        base: PreTrainedModel | str | Path,
        shared_layers: Sequence[int] | None = None,
        num_shared: int | None = None,
        similarity: "AttentionSimilarity | None" = None,
        **kwargs,
    ) -> "EchoAttForCausalLM":
        """Make a student from a Llama, Mistral, Qwen2 or Qwen3 model: every weight is copied except the query and key
        projections of the shared layers.

        Args:
            base: a model, a Hub id or a folder.
            shared_layers: layers that use the attention map of an earlier layer, counted from 0. Pass `shared_source=` as
                well to say which; it is the nearest earlier layer with a map of its own otherwise.
            num_shared: instead of `shared_layers`, how many layers shall share; `similarity` chooses them, or, without
                it, [`evenly_shared_layers`].
            similarity: what [`~hf_attn.analysis.attention_similarity`] measured on the base.
            kwargs: `dtype`, and fields of [`EchoAttConfig`] to set differently.

        Raises:
            ValueError: if the base is of another architecture, if not exactly one of `shared_layers` and `num_shared` is
                given, or if the layers cannot be shared.
        """
        if (shared_layers is None) == (num_shared is None):
            raise ValueError("Give exactly one of shared_layers and num_shared.")
        if similarity is not None and num_shared is None:
            raise ValueError("similarity chooses num_shared layers; it has no use with explicit shared_layers.")
        if num_shared is not None:
            config = base.config if isinstance(base, PreTrainedModel) else AutoConfig.from_pretrained(base)
            if similarity is None:
                shared_layers = evenly_shared_layers(config.num_hidden_layers, num_shared)
            elif similarity.num_layers != config.num_hidden_layers:
                raise ValueError(
                    f"The similarity was measured on a model with {similarity.num_layers} layers; this base has "
                    f"{config.num_hidden_layers}."
                )
            else:
                shared_layers = similarity.shared_layers(num_shared=num_shared)
        return super().from_base(base, shared_layers=shared_layers, **kwargs)

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


def evenly_shared_layers(num_layers: int, num_shared: int) -> list[int]:
    """Shared layers without any measurement: in blocks of about equal length.

    The first and the last layer, which resemble the others least in most models, keep their own map as long as
    `num_shared` leaves room for that.

    Raises:
        ValueError: if `num_shared` is not between 0 and `num_layers - 1`.
    """
    if not 0 <= num_shared < num_layers:
        raise ValueError(f"num_shared must be between 0 and {num_layers - 1}, got {num_shared}.")
    inner = range(1, num_layers - 1) if num_shared < num_layers - 2 else range(num_layers)
    num_blocks = len(inner) - num_shared
    starts = {inner[len(inner) * block // num_blocks] for block in range(num_blocks)}
    return [layer for layer in inner if layer not in starts]


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


__all__ = ["EchoAttForCausalLM", "EchoAttModel", "EchoAttPreTrainedModel", "evenly_shared_layers"]
