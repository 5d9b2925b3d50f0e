"""Disentangled attention as its equation reads: the specification of the other implementations.

    S_ij = scale * (Q_i . K_j + Q_i . Kr_t(i,j) + K_j . Qr_t(i,j)),    output = softmax_j(S) V

Both position terms use the row t(i, j) of the distance from key j to query i. The paper prints the mirrored row for the
second term; the weights of the official code were trained with this one.
"""

import torch
from torch.nn import functional as F

from .call import DisentangledCall


def position_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    index: torch.Tensor,
) -> torch.Tensor | None:
    """The two position terms, unscaled.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, heads, kv_len, head_dim)`.
        position_key: `(heads, rows, head_dim)`, the positions as keys of the content; none leaves the term out.
        position_query: `(heads, rows, head_dim)`, the positions as queries of the content; none leaves the term out.
        index: row of each pair, `(q_len, kv_len)` or `(batch, q_len, kv_len)`.

    Returns:
        `(batch, heads, q_len, kv_len)`; none if there is no position term.
    """
    index = (index[None] if index.ndim == 2 else index)[:, None].expand(*query.shape[:2], -1, -1)
    scores = None
    if position_key is not None:
        scores = (query @ position_key.transpose(-1, -2)).gather(-1, index)
    if position_query is not None:
        of_keys = (position_query @ key.transpose(-1, -2)).gather(-2, index)
        scores = of_keys if scores is None else scores + of_keys
    return scores


def masked_out(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Scores with the lowest finite number where the mask `(batch, 1, 1 or q_len, kv_len)` is false.

    Finite, so that a text of nothing but padding becomes a mean and not NaN.
    """
    if attention_mask is None:
        return scores
    return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)


def eager_disentangled(call: DisentangledCall, found: None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, with scores and softmax in float32 at least.

    Returns:
        Output `(batch, heads, q_len, head_dim)` and weights `(batch, heads, q_len, kv_len)`.
    """
    query, key, value = call.query, call.key, call.value
    wide = torch.promote_types(query.dtype, torch.float32)
    wide_query, wide_key = query.to(wide), key.to(wide)
    position_key, position_query = (None if p is None else p.to(wide) for p in call.positions)
    scores = wide_query @ wide_key.transpose(-1, -2)
    of_positions = position_scores(wide_query, wide_key, position_key, position_query, call.row_of_pairs())
    if of_positions is not None:
        scores = scores + of_positions
    weights = masked_out(scores * call.scaling, call.attention_mask).softmax(-1).to(value.dtype)
    weights = F.dropout(weights, call.dropout, training=call.dropout > 0)
    return weights @ value, weights
