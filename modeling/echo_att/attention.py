# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention whose map other layers share, and when the `sdpa` implementation computes that map.

Handing over the map saves the most work where it is small: in a step of decoding and in training on short sequences.
Elsewhere a shared layer attends with the queries and keys of its source, which needs no map in memory.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_attn.attention import AttentionCall, Refusal
from hf_attn.attention.dispatch import AttentionFunction, Implementation


#: Largest map (queries times keys) that the `sdpa` implementation hands over in training. The layer that computes it pays
#: for not being fused, in memory traffic that grows with the map; each layer that reuses it saves about half of its
#: attention. In a forward pass without a backward only a single row, in decoding, is worth it (measured on a CPU).
MAX_SHARED_MAP = 256 * 256


@dataclass(eq=False)
class EchoCall(AttentionCall):
    """A call of a layer that computes its own attention, or attends with the queries and keys of another layer.

    Attributes:
        module: the attention layer.
        is_source: whether other layers share the map.
        kwargs: other keyword arguments of the model, for transformers' function.
    """

    _: KW_ONLY
    module: nn.Module
    is_source: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


def apply_attention_weights(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`A V` without repeating the values of a group.

    Args:
        weights: `(batch, heads, q_len, kv_len)`.
        value: `(batch, kv_heads, kv_len or more, head_dim)`; entries beyond `kv_len` are unused slots of a static cache.

    Returns:
        `(batch, heads, q_len, head_dim)`.
    """
    batch, heads, q_len, kv_len = weights.shape
    value = value[:, :, :kv_len]
    kv_heads, head_dim = value.shape[1], value.shape[3]
    output = weights.reshape(batch, kv_heads, heads // kv_heads * q_len, kv_len) @ value
    return output.view(batch, heads, q_len, head_dim)


def echo_attention_eager(call: EchoCall, found: None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention that returns the map before dropout, which is what the other layers share.

    Takes the masks of both `eager` (additive) and `sdpa` (boolean, or none for plain causality).
    """
    query, key, attention_mask = call.query, call.key, call.attention_mask
    batch, heads, q_len, head_dim = query.shape
    if attention_mask is None and q_len > 1:
        key = key[:, :, :q_len]
        attention_mask = torch.ones(q_len, q_len, dtype=torch.bool, device=query.device).tril()
    kv_heads = key.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads * q_len, head_dim)
    scores = query @ key.transpose(-1, -2) * call.scaling
    scores = scores.view(batch, heads, q_len, key.shape[2])
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=call.dropout)
    return apply_attention_weights(dropped, call.value), weights


def _check_map(call: EchoCall) -> Refusal | None:
    queries, keys = call.query.shape[2], call.key.shape[2]
    if not call.is_source:
        return Refusal("no other layer shares its map")
    if queries > 1 and not (call.module.training and queries * keys <= MAX_SHARED_MAP):
        return Refusal(f"a map of {queries} queries and {keys} keys costs more memory than it saves")
    return None


def _sdpa(call: EchoCall, found: None) -> tuple[torch.Tensor, None]:
    if call.query.shape[0] == 0:
        # transformers' function cannot reshape an empty batch.
        return call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1]), None
    output, _ = sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        call.attention_mask,
        dropout=call.dropout,
        scaling=call.scaling,
        **call.kwargs,
    )
    return output.transpose(1, 2), None


class _EchoAttention(AttentionFunction):
    automatic = "sdpa"


ECHO = _EchoAttention(
    name="echo",
    call=EchoCall,
    implementations=(
        Implementation("shared_map", echo_attention_eager, _check_map),
        Implementation("sdpa", _sdpa),
        Implementation("eager", echo_attention_eager),
    ),
)
