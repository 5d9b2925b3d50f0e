"""Disentangled attention by FlexAttention: the position terms are looked up inside the kernel.

Memory grows with length times rows of the table, not with the square of the length.
"""

import torch
from torch.nn.attention.flex_attention import flex_attention

from ..call import Refusal
from .call import DisentangledCall


_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def check_flex(call: DisentangledCall) -> Refusal | None:
    if call.dropout:
        return Refusal(
            "FlexAttention does not support dropout (set attention_probs_dropout_prob = 0 to train without it)"
        )
    if call.query.device.type == "cpu" and call.needs_gradient:
        return Refusal("FlexAttention has no backward pass on the CPU")
    return None


def flex_disentangled(call: DisentangledCall, found: None = None) -> tuple[torch.Tensor, None]:
    """Without dropout. On a CPU it has no gradients, and is compiled only as a part of a compiled model."""
    query, key, value, attention_mask, scaling = call.query, call.key, call.value, call.attention_mask, call.scaling
    position_key, position_query = call.positions
    # One row for each distance, or one for each pair.
    index = call.index() if call.rows is None else call.rows
    of_queries = None if position_key is None else query @ (position_key * scaling).transpose(-1, -2)
    of_keys = None if position_query is None else key @ (position_query * scaling).transpose(-1, -2)
    last_key = key.shape[2] - 1
    lowest = torch.finfo(torch.float32).min
    per_batch = index.ndim == 3
    if per_batch:
        index = index.expand(query.shape[0], -1, -1)
    mask_rows = None if attention_mask is None else attention_mask.shape[2]

    def score_mod(score, b, h, i, j):
        if index.ndim == 1:
            row = index[i - j + last_key]
        else:
            row = index[b, i, j] if per_batch else index[i, j]
        if of_queries is not None:
            score = score + of_queries[b, h, i, row]
        if of_keys is not None:
            score = score + of_keys[b, h, j, row]
        if attention_mask is not None:
            seen = attention_mask[b, 0, 0 if mask_rows == 1 else i, j]
            score = torch.where(seen, score, lowest)
        return score

    attention = flex_attention if query.device.type == "cpu" else _compiled_flex_attention
    return attention(query, key, value, score_mod=score_mod, scale=scaling), None
