"""Disentangled attention by FlexAttention: the position terms are looked up inside the kernel.

Memory grows with length times rows of the table, not with the square of the length.
"""

import torch
from torch.nn.attention.flex_attention import flex_attention


_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def flex_disentangled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    index: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """As :func:`~hf_attn.kernels.disentangled.eager.eager_disentangled`, without dropout.

    Args:
        index: as there, or the row of every distance from 1 - kv_len to q_len - 1, `(q_len + kv_len - 1,)`.

    On a CPU FlexAttention has no gradients, and is compiled only as a part of a compiled model.
    """
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
    return attention(query, key, value, score_mod=score_mod, scale=scaling)
