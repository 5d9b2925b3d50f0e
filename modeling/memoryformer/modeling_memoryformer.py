# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""MemoryFormer (arXiv 2411.12992): a decoder whose projections and feed-forward blocks are tables.

    h = norm(x);   q, k, v = M_q(h), M_k(h), M_v(h)         one hash of h for all three
    z = x + attention(q, k, v)                               no output projection
    y = z + M_2(layer_norm(M_1(norm(z))))                    no activation

M are [`~hf_attn.architectures.memory_layer.MemoryLayer`]s. The head is the only matrix.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

from hf_attn.architectures.decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    takes_cache,
)
from hf_attn.architectures.memory_layer import MemoryLayer

from .configuration_memoryformer import MemoryFormerConfig


class MemoryFormerRMSNorm(nn.Module):
    """`scale * x / (rms(x) + eps)`: the epsilon is outside of the root."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float() if hidden_states.dtype.itemsize < 4 else hidden_states
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        return (wide / (rms + self.eps)).to(hidden_states.dtype) * self.weight


def _memory_layer(config: MemoryFormerConfig, out_features: int, extra_bits: int = 0) -> MemoryLayer:
    code_length = config.code_length + extra_bits
    return MemoryLayer(
        config.num_tables * code_length,
        out_features,
        code_length,
        bucket_weight=config.bucket_weight,
        temperature=config.temperature,
        sparse_gradients=config.sparse_gradients,
    )


class MemoryFormerAttention(DecoderAttention):
    """Softmax attention on queries, keys and values from tables, without an output projection."""

    def __init__(self, config: MemoryFormerConfig, layer_idx: int):
        with torch.device("meta"):
            super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, _memory_layer(config, getattr(self, name).out_features))
        del self.o_proj
        self.dropout = nn.Dropout(config.hidden_dropout)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hashed = self.q_proj.hash(hidden_states)
        query, key, value = (
            projection.fetch(*hashed)
            .view(*hidden_states.shape[:-1], projection.out_features // self.head_dim, self.head_dim)
            .transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.dropout(output.flatten(-2)), weights


class MemoryFormerMLP(nn.Module):
    """Two memory layers with a layer norm between them, whose chunks are longer there."""

    def __init__(self, config: MemoryFormerConfig):
        super().__init__()
        self.up_proj = _memory_layer(config, config.intermediate_size)
        self.layernorm = nn.LayerNorm(config.intermediate_size, eps=1e-5)
        self.down_proj = _memory_layer(config, config.hidden_size, config.extra_bits)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.layernorm(self.up_proj(hidden_states))))


class MemoryFormerLayer(DecoderLayer):
    def make_mixer(self, config: MemoryFormerConfig, layer_idx: int) -> MemoryFormerAttention:
        return MemoryFormerAttention(config, layer_idx)

    def make_mlp(self, config: MemoryFormerConfig, layer_idx: int) -> nn.Module:
        return MemoryFormerMLP(config)

    def make_norm(self, config: MemoryFormerConfig) -> nn.Module:
        return MemoryFormerRMSNorm(config.hidden_size, config.rms_norm_eps)


class MemoryFormerPreTrainedModel(DecoderPreTrainedModel):
    config: MemoryFormerConfig
    layer_class = MemoryFormerLayer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryLayer):
            init.normal_(module.tables, std=self.config.initializer_range)
            init.normal_(module.bias, std=0.001)
        if isinstance(module, MemoryFormerAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.tables, std=(2 / (5 * self.config.hidden_size)) ** 0.5)


class MemoryFormerModel(MemoryFormerPreTrainedModel, DecoderModel):
    """The decoder without a head."""

    def make_norm(self, config: MemoryFormerConfig) -> nn.Module:
        return MemoryFormerRMSNorm(config.hidden_size, config.rms_norm_eps)

    def make_rotary_embedding(self, config: MemoryFormerConfig) -> nn.Module:
        return GPTNeoXRotaryEmbedding(config)


class MemoryFormerForCausalLM(MemoryFormerPreTrainedModel, DecoderForCausalLM):
    """The decoder with a language modelling head."""

    model_class = MemoryFormerModel
    _tp_plan = {}  # tables are not split, and neither is the tied head


__all__ = ["MemoryFormerForCausalLM", "MemoryFormerModel", "MemoryFormerPreTrainedModel"]
