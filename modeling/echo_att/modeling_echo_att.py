# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""EchoAtt (arXiv 2409.14595): a Llama-like model in which some layers reuse the attention map of an earlier layer.

A shared layer has no query and key projections and caches values only:

    layer that owns its map:  A = softmax(Q K^T / sqrt(d) + mask),  output A V
    layer that shares it:     output A V_j, with its own values, output projection, norms and MLP

Where A is large a shared layer attends with the queries and keys of its source and its own values instead, which is the same
function and needs no map in memory; see `attention.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
    takes_cache,
)

from .attention import ECHO, EchoCall, apply_attention_weights
from .configuration_echo_att import EchoAttConfig


if TYPE_CHECKING:
    from hf_attn.analysis import AttentionSimilarity


class EchoAttAttention(DecoderAttention):
    """Attention of one layer: with a map of its own, or with the map of the layer that it shares with."""

    def __init__(self, config: EchoAttConfig, layer_idx: int):
        source_idx = config.attention_source.get(layer_idx)
        super().__init__(config, layer_idx, has_queries_and_keys=source_idx is None)
        self.source_idx = source_idx
        self.is_source = layer_idx in config.attention_source.values()

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        shared_query: torch.Tensor | None = None,
        shared_key: torch.Tensor | None = None,
        shared_weights: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
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
        value_states, attn_weights = self.values(hidden_states), None
        if self.source_idx is not None:
            query_states, key_states, attn_weights = shared_query, shared_key, shared_weights
            value_states = self.cached_values(value_states, cache)
        else:
            query_states, key_states = self.queries_and_keys(hidden_states, position_embeddings)
            if cache is not None:
                key_states, value_states = cache.update(key_states, value_states, self.layer_idx)

        if attn_weights is not None:
            dropped = nn.functional.dropout(attn_weights, p=self.attention_dropout, training=self.training)
            attn_output = apply_attention_weights(dropped, value_states).transpose(1, 2)
        else:
            attn_output, attn_weights = self.attend(query_states, key_states, value_states, attention_mask, **kwargs)
        return self.output(attn_output), attn_weights, query_states, key_states

    def attend(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = self.config._attn_implementation
        if implementation not in ECHO.names:
            return super().attend(query_states, key_states, value_states, attention_mask, **kwargs)
        call = EchoCall(
            query_states,
            key_states,
            value_states,
            module=self,
            is_source=self.is_source,
            attention_mask=attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            kwargs=kwargs,
        )
        output, weights = ECHO(call, implementation)
        return output.transpose(1, 2), weights


class EchoAttDecoderLayer(DecoderLayer):
    """A Llama layer that takes and returns an attention map, as plain tensors, which every checkpointing function supports."""

    def make_mixer(self, config: EchoAttConfig, layer_idx: int) -> EchoAttAttention:
        return EchoAttAttention(config, layer_idx)

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


class EchoAttPreTrainedModel(DecoderPreTrainedModel):
    config: EchoAttConfig
    layer_class = EchoAttDecoderLayer


class EchoAttModel(EchoAttPreTrainedModel, DecoderModel):
    """The decoder without a head."""

    def run_layers(self, layers: nn.ModuleList, hidden_states: torch.Tensor, masks: dict, **kwargs) -> torch.Tensor:
        maps = {}
        for layer_idx, layer in enumerate(layers):
            hidden_states, *attention_map = layer(
                hidden_states,
                *maps.get(layer.self_attn.source_idx, (None, None, None)),
                attention_mask=masks[layer.self_attn.mask_kind],
                **kwargs,
            )
            if layer.self_attn.is_source:
                maps[layer_idx] = attention_map
        return hidden_states


class EchoAttForCausalLM(FromLlamaMixin, EchoAttPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head; `from_base` makes one from a Llama-like model."""

    model_class = EchoAttModel

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
            num_shared: instead of `shared_layers`, the number of layers that share; `similarity` chooses them, or, without
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
            raise ValueError(
                "similarity is used to choose num_shared layers; do not pass it with explicit shared_layers."
            )
        if num_shared is not None:
            config = base.config if isinstance(base, PreTrainedModel) else AutoConfig.from_pretrained(base)
            if similarity is None:
                shared_layers = evenly_shared_layers(config.num_hidden_layers, num_shared)
            elif similarity.num_layers != config.num_hidden_layers:
                raise ValueError(
                    f"The similarity was measured on a model with {similarity.num_layers} layers, but this base has "
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
    def config_from_base(cls, base_config, **overrides) -> EchoAttConfig:
        if "shared_layers" in overrides:
            # The sources of a model that shares already belong to its own shared layers.
            overrides = {"shared_source": None, **overrides}
        return super().config_from_base(base_config, **overrides)


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


__all__ = ["EchoAttForCausalLM", "EchoAttModel", "EchoAttPreTrainedModel", "evenly_shared_layers"]
