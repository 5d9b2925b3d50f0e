# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Causal language models and sequence classifiers with a token mixer by name (arXiv 2302.06218)."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification

from hf_attn.architectures.decoder import (
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    Mixer,
    StateLayer,
    takes_cache,
)
from hf_attn.mixers import TokenMixer

from .configuration_unified_long_sequence import TokenMixerConfig


class PastInputs(StateLayer):
    """The earlier inputs of a mixer, and which of them are tokens.

    What mixers could keep differs from kind to kind; from its inputs each can compute its next outputs.
    """

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is minus their number."""
        if tokens_to_remove != 0:
            self._select(lambda state: state[:, :tokens_to_remove])
            self.seen_tokens = max(self.seen_tokens - abs(tokens_to_remove), 0)

    def extend(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add inputs `(batch, length, hidden_size)` and their mask, `None` without padding; return all of both."""
        earlier, earlier_mask = self.states.get("inputs"), self.states.get("mask")
        if earlier is not None:
            if mask is not None or earlier_mask is not None:
                masks = (earlier, earlier_mask), (hidden_states, mask)
                mask = torch.cat([_mask_of(*states) for states in masks], 1)
            hidden_states = torch.cat([earlier, hidden_states], 1)
        self.states["inputs"] = hidden_states
        if mask is not None:
            self.states["mask"] = mask
        return hidden_states, mask


def _mask_of(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    everything = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    return everything if mask is None else mask


class TemplateMixer(Mixer):
    """The mixer that a configuration names, and an output projection."""

    cache_kind, mask_kind = PastInputs, "padding"

    def __init__(self, config: TokenMixerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mixer = TokenMixer.from_name(
            config.mixer,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            max_length=config.max_position_embeddings,
            causal=config.causal,
            rank=config.mixer_rank,
            num_landmarks=config.num_landmarks,
            window=config.mixer_window,
            mixing_size=config.mixing_size,
            pseudo_inverse=config.pseudo_inverse,
        )
        self.o_proj = nn.Linear(self.mixer.out_features, config.hidden_size, bias=False)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """Mix the tokens.

        Args:
            hidden_states: `(batch, length, hidden_size)`, normalised.
            attention_mask: boolean `(batch, length)`, false for padding.
            cache: earlier inputs.
        """
        start = 0
        if cache is not None:
            if not self.config.causal:
                raise ValueError(
                    "A model with causal=False does not support a cache: its outputs depend on later tokens."
                )
            length = hidden_states.shape[1]
            hidden_states, attention_mask = cache.layers[self.layer_idx].extend(hidden_states, attention_mask)
            start = hidden_states.shape[1] - length
        return self.o_proj(self.mixer(hidden_states, attention_mask, start)), None


class TokenMixerLayer(DecoderLayer):
    def make_mixer(self, config: TokenMixerConfig, layer_idx: int) -> Mixer:
        return TemplateMixer(config, layer_idx)


class TokenMixerPreTrainedModel(DecoderPreTrainedModel):
    config: TokenMixerConfig
    layer_class = TokenMixerLayer
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TokenMixer):
            module.reset_parameters()


class TokenMixerModel(TokenMixerPreTrainedModel, DecoderModel):
    """The model without a head. Position embeddings are learned, because most mixers do not depend on the order of the tokens."""

    def __init__(self, config: TokenMixerConfig):
        super().__init__(config)
        self.embed_position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.post_init()

    def make_rotary_embedding(self, config: TokenMixerConfig) -> None:
        return None

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        longest = self.config.max_position_embeddings
        if not torch.compiler.is_compiling() and position_ids.numel() > 0 and int(position_ids.max()) >= longest:
            raise ValueError(
                f"The model has {longest} positions (max_position_embeddings), but got {int(position_ids.max()) + 1} "
                "tokens: truncate the input."
            )
        return inputs_embeds + self.embed_position(position_ids)


class TokenMixerForCausalLM(TokenMixerPreTrainedModel, DecoderForCausalLM):
    """A causal language model with a token mixer."""

    model_class = TokenMixerModel
    _tp_plan = {}  # mixers are not split, and neither is the tied head

    def __init__(self, config: TokenMixerConfig):
        if not config.causal:
            raise ValueError(
                "TokenMixerForCausalLM needs causal=True: otherwise its inputs would contain the tokens that it predicts."
            )
        super().__init__(config)


class TokenMixerForSequenceClassification(GenericForSequenceClassification, TokenMixerPreTrainedModel):
    """A classifier of sequences, by the last token that is not padding."""


__all__ = [
    "TokenMixerForCausalLM",
    "TokenMixerForSequenceClassification",
    "TokenMixerModel",
    "TokenMixerPreTrainedModel",
]
