"""Softmax attention in plain PyTorch, the reference for every model with softmax attention."""

import torch
from torch import nn


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, `softmax(scaling * Q K^T + position bias + mask) V`, with transformers' attention signature.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, heads, kv_len, head_dim)`.
        value: `(batch, heads, kv_len, value_dim)`.
        attention_mask, position_bias: added to the logits, broadcast to `(batch, heads, q_len, kv_len)`.

    Returns:
        Output `(batch, q_len, heads, value_dim)` and weights `(batch, heads, q_len, kv_len)`.
    """
    logits = query @ key.transpose(-2, -1) * scaling
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
