# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Language models with Combiner attention (arXiv 2107.05768)."""

import math

import torch
from torch import nn
from transformers import initialization as init

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    FromLlamaMixin,
    make_norm,
)
from hf_attn.architectures.encoder import EncoderForMaskedLM, EncoderModel
from hf_attn.attention.combiner import COMBINERS
from hf_attn.attention.family import OwnAttentionMixin
from hf_attn.kernels.combiner.plan import ROWMAJOR

from .cache import CombinerCacheLayer
from .configuration_combiner import CombinerConfig, CombinerEncoderConfig


class CombinerRowKeys(nn.Module):
    """Keys of the summaries of rows, `W_2 norm(W_1 o + x)`, from the outputs `o` of attention to a row and the inputs `x`."""

    def __init__(self, config: CombinerConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.output_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.norm = make_norm(config)
        self.key_proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, row_output: torch.Tensor, row_input: torch.Tensor) -> torch.Tensor:
        """Args:
        row_output: `(batch, heads, length, head_dim)`.
        row_input: `(batch, length, hidden_size)`.

        Returns:
            Keys `(batch, heads, length, head_dim)`.
        """
        merged = self.dropout(self.output_proj(row_output.transpose(1, 2).flatten(-2)))
        keys = self.key_proj(self.norm(merged + row_input))
        return keys.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class CombinerAttention(DecoderAttention):
    """Combiner attention; everything about its weights is in `hf_attn.attention.combiner`."""

    cache_kind = CombinerCacheLayer

    def __init__(self, config: CombinerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        mechanism = COMBINERS[config.combiner_kind]
        # The registered specification: it takes the additive masks of "eager" as well.
        self.eager_attention_forward = mechanism.attention_function(f"{mechanism.name}_eager")
        self.row_keys = CombinerRowKeys(config) if config.combiner_kind == ROWMAJOR else None

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.row_keys is not None:
            kwargs |= {"row_key": self.row_keys, "row_input": hidden_states}
        return super().forward(hidden_states, *args, **kwargs)


class CombinerLayer(DecoderLayer):
    def __init__(self, config: CombinerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dropout = nn.Dropout(config.residual_dropout)

    def make_mixer(self, config: CombinerConfig, layer_idx: int) -> CombinerAttention:
        return CombinerAttention(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class CombinerPreTrainedModel(OwnAttentionMixin, DecoderPreTrainedModel):
    config: CombinerConfig
    layer_class = CombinerLayer
    # Where the sequences of a row begin is read off the mask.
    _can_compile_fullgraph = False

    @property
    def attention_mechanism(self):
        """The attention function of the configuration's plan."""
        return COMBINERS[self.config.combiner_kind]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.normal_(module.bias, std=1e-6)
        elif isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            # As in the public code, whose head has weights of its own. A tied head would begin with logits as large as
            # the square root of the width.
            init.normal_(module.weight)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])


class _Positions:
    """Positions of the embeddings, for decoder and encoder."""

    def make_rotary_embedding(self, config: CombinerConfig) -> nn.Module | None:
        return super().make_rotary_embedding(config) if config.position_embedding_type == "rope" else None

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.config.position_embedding_type != "sinusoidal":
            return inputs_embeds
        half = self.config.hidden_size // 2
        steps = torch.arange(half, device=inputs_embeds.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * torch.exp(-steps * (math.log(10000.0) / (half - 1)))
        return inputs_embeds + torch.cat((angles.sin(), angles.cos()), dim=-1).to(inputs_embeds.dtype)


class CombinerModel(_Positions, CombinerPreTrainedModel, DecoderModel):
    """The decoder without a head."""


class _HeadWithBias:
    """The language modelling head, with a bias if the configuration has one."""

    def __init__(self, config: CombinerConfig):
        super().__init__(config)
        if config.lm_head_bias:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
            self.post_init()


class CombinerForCausalLM(_HeadWithBias, FromLlamaMixin, CombinerPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head."""

    model_class = CombinerModel
    takes_sliding_windows = False

    @classmethod
    def config_from_base(cls, base_config, **overrides):
        if base_config.model_type != cls.config_class.model_type:
            llama = {
                "position_embedding_type": "rope",
                "norm_type": "rms_norm",
                "gated_mlp": True,
                "mlp_bias": getattr(base_config, "mlp_bias", False),
                "lm_head_bias": False,
            }
            overrides = llama | overrides
        return super().config_from_base(base_config, **overrides)

    @classmethod
    def new_to_base(cls, name: str, config: CombinerConfig) -> bool:
        return ".self_attn.row_keys." in name


class CombinerEncoderPreTrainedModel(CombinerPreTrainedModel):
    config: CombinerEncoderConfig


class CombinerEncoderModel(_Positions, CombinerEncoderPreTrainedModel, EncoderModel):
    """The encoder without a head."""


class CombinerForMaskedLM(_HeadWithBias, CombinerEncoderPreTrainedModel, EncoderForMaskedLM):
    """The encoder with a head that predicts masked tokens."""

    model_class = CombinerEncoderModel


__all__ = [
    "CombinerEncoderModel",
    "CombinerEncoderPreTrainedModel",
    "CombinerForCausalLM",
    "CombinerForMaskedLM",
    "CombinerModel",
    "CombinerPreTrainedModel",
]
