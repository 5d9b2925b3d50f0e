"""Landmark attention (arXiv 2305.16300): a grouped softmax in which landmark tokens gate the blocks that they close.

A landmark is the last token of its block. With b(j) the number of landmarks before position j, the scores of query i are
normalised in groups, each by a softmax of its own:

    own group:    the regular tokens of the query's own block b(i) and the landmarks of all other blocks;
    other groups: the regular tokens of each other block.

    A_ij = S_ij                    regular token of the own block
    A_ij = S_ij * S_i,landmark(c)  regular token of another block c
    A_ij = 0                       landmark

Rows sum to one, unless a block without tokens takes its share. Under a causal mask the other blocks are the earlier ones.
"""

import torch
from torch import nn

from ..kernels.landmark.blockwise import landmark_attention_blockwise, supports_landmark_blockwise
from ..kernels.triton_support import landmark_tile, supports_landmark_triton
from .interface import Implementation, Mechanism


def blocks_of(is_landmark: torch.Tensor) -> torch.Tensor:
    """The block of each token, counted from 0: the number of landmarks before it.

    Args:
        is_landmark: boolean `(batch, length)`.
    """
    landmarks = is_landmark.long()
    return landmarks.cumsum(-1) - landmarks


def visible_groups(
    is_landmark: torch.Tensor, allowed: torch.Tensor, query_block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which keys a query sees, by their part in the grouped softmax.

    Args:
        is_landmark: boolean `(batch, kv_len)`.
        allowed: boolean, broadcastable to `(batch, heads, q_len, kv_len)`.
        query_block: `(batch, q_len)`, the block of each query.

    Returns:
        Three disjoint boolean masks, broadcastable to `(batch, heads, q_len, kv_len)`: regular tokens of the query's own
        block, landmarks of other blocks (its gates), regular tokens of other blocks. The landmark of its own block, itself
        if it is one, is in none of them.
    """
    in_own_block = query_block[:, None, :, None] == blocks_of(is_landmark)[:, None, None, :]
    landmark = is_landmark[:, None, None, :]
    return in_own_block & ~landmark & allowed, ~in_own_block & landmark & allowed, ~(in_own_block | landmark) & allowed


def grouped_softmax(
    scores: torch.Tensor,
    is_landmark: torch.Tensor,
    allowed: torch.Tensor,
    query_block: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights from scores, as the equations read.

    Args:
        scores: ``(batch, heads, q_len, kv_len)``.
        is_landmark: boolean ``(batch, kv_len)``; landmarks may be anywhere, and there may be any number of them.
        allowed: boolean, broadcastable to the scores: the pairs that may attend. That a landmark does not see itself needs
            not be in it.
        query_block: ``(batch, q_len)``, the block of each query; if not given, the queries are the last ``q_len`` tokens.

    Returns:
        Weights in the dtype of the scores; zeros for a query that may see nothing.
    """
    q_len, kv_len = scores.shape[-2:]
    block = blocks_of(is_landmark)
    if query_block is None:
        query_block = block[:, (torch.arange(q_len, device=scores.device) + kv_len - q_len).clamp(min=0)]
    own, gate, inside = visible_groups(is_landmark, allowed, query_block)
    own_weights = _masked_softmax(scores, own | gate)

    # A softmax within each other block: maxima and sums are gathered by block.
    index = block[:, None, None, :].expand_as(scores)
    inside_scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
    maxima = inside_scores.detach().scatter_reduce(-1, index, inside_scores.detach(), "amax", include_self=False)
    exponentials = (inside_scores - maxima.gather(-1, index)).exp().masked_fill(~inside, 0.0)
    sums = torch.zeros_like(scores).scatter_add(-1, index, exponentials).gather(-1, index)
    inside_weights = exponentials / sums.masked_fill(~inside, 1.0)

    gates = torch.zeros_like(scores).scatter_add(-1, index, own_weights.masked_fill(~gate, 0.0))
    return inside_weights * gates.gather(-1, index) + own_weights.masked_fill(gate, 0.0)


def _masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def landmark_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    is_landmark: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    output_weights: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmark attention with the weights of :func:`grouped_softmax`; the specification of the other implementations.

    Args:
        query: ``(batch, heads, q_len, head_dim)``, the last ``q_len`` tokens of the sequence.
        key: ``(batch, kv_heads, kv_len, head_dim)``; head ``h`` uses key/value head ``h // (heads // kv_heads)``.
        value: ``(batch, kv_heads, kv_len, value_dim)``.
        scaling: factor of the scores.
        is_landmark: boolean ``(batch, kv_len or more)``; without it there are no landmarks, and the softmax is an ordinary
            one.
        attention_mask: broadcastable to ``(batch, heads, q_len, kv_len)``; boolean (``True``: may attend) or additive,
            where entries at half of the dtype's minimum or below mean masked.
        is_causal: a query sees the keys up to its own position.
        sliding_window: a query sees the keys less than this far from its position.
        dropout: probability of dropping a weight.
        output_weights: accepted for all implementations; the weights are returned anyway.

    Returns:
        Output ``(batch, heads, q_len, value_dim)`` and weights ``(batch, heads, q_len, kv_len)``, both in the dtype of
        the query. The softmax is computed in float32 (or in float64 for float64 input).

    Raises:
        ValueError: if ``is_landmark`` does not cover the keys.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scaling

    q_len, kv_len = scores.shape[-2:]
    distance = torch.arange(q_len, device=query.device)[:, None] + kv_len - q_len
    distance = distance - torch.arange(kv_len, device=query.device)
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window is not None:
        allowed = allowed & (distance.abs() < sliding_window)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        allowed = allowed & attention_mask
    elif attention_mask is not None:
        allowed = allowed & (attention_mask > torch.finfo(attention_mask.dtype).min / 2)
        scores = scores + attention_mask

    weights = grouped_softmax(scores, _landmarks_of_keys(is_landmark, key), allowed).to(query.dtype)
    return nn.functional.dropout(weights, p=dropout) @ value, weights


def _landmarks_of_keys(is_landmark: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    batch, kv_len = key.shape[0], key.shape[2]
    if is_landmark is None:
        return torch.zeros(batch, kv_len, dtype=torch.bool, device=key.device)
    if is_landmark.shape[0] != batch or is_landmark.shape[1] < kv_len:
        raise ValueError(
            f"is_landmark must say of each key whether it is a landmark, shape ({batch}, {kv_len}), got "
            f"{tuple(is_landmark.shape)}."
        )
    return is_landmark[:, :kv_len]


def _supports_eager(query, key, value, **arguments) -> tuple[bool, str]:
    return True, ""


def _landmark_attention_torch(query, key, value, *, dropout, output_weights, **arguments):
    return landmark_attention_blockwise(query, key, value, **arguments), None


def _landmark_attention_triton(
    query, key, value, *, is_landmark, is_causal, sliding_window, dropout, output_weights, **arguments
):
    from ..kernels.landmark.triton import landmark_attention_triton

    block_size = landmark_tile(is_landmark, key.shape[2])
    return landmark_attention_triton(query, key, value, block_size=block_size, **arguments), None


def _arguments(module: nn.Module, kwargs: dict) -> dict:
    is_landmark = kwargs.pop("is_landmark", None)
    return {"is_landmark": None if is_landmark is None else is_landmark.bool()}


LANDMARK = Mechanism(
    name="landmark",
    implementations=(
        Implementation("triton", _landmark_attention_triton, supports_landmark_triton),
        Implementation("torch", _landmark_attention_torch, supports_landmark_blockwise),
        Implementation("eager", landmark_attention_eager, _supports_eager),
    ),
    arguments=_arguments,
)
