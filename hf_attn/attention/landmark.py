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

from ..kernels.landmark.blockwise import landmark_attention_blockwise
from ..kernels.landmark.call import LandmarkCall, check_blockwise, check_triton
from .dispatch import Implementation
from .interface import Mechanism


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
    """Keys that a query attends to, by their role in the grouped softmax.

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
        scores: `(batch, heads, q_len, kv_len)`.
        is_landmark: boolean `(batch, kv_len)`; landmarks may be anywhere, and there may be any number of them.
        allowed: boolean, broadcastable to the scores: the pairs that may attend. That a landmark does not see itself needs
            not be in it.
        query_block: `(batch, q_len)`, the block of each query; if not given, the queries are the last `q_len` tokens.

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


def landmark_attention_eager(call: LandmarkCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmark attention with the weights of [`grouped_softmax`]; the specification of the other implementations.

    Returns:
        Output `(batch, heads, q_len, value_dim)` and weights `(batch, heads, q_len, kv_len)`, both in the dtype of
        the query. The softmax is computed in float32 (or in float64 for float64 input).

    Raises:
        ValueError: if `is_landmark` does not cover the keys.
    """
    query, mask = call.query, call.attention_mask
    key, value = call.repeated_heads()
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * call.scaling

    q_len, kv_len = scores.shape[-2:]
    distance = torch.arange(q_len, device=query.device)[:, None] + kv_len - q_len
    distance = distance - torch.arange(kv_len, device=query.device)
    allowed = distance >= 0 if call.is_causal else torch.ones_like(distance, dtype=torch.bool)
    if call.sliding_window is not None:
        allowed = allowed & (distance.abs() < call.sliding_window)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask > torch.finfo(mask.dtype).min / 2)
        scores = scores + mask

    weights = grouped_softmax(scores, _landmarks_of_keys(call.is_landmark, key), allowed).to(query.dtype)
    return nn.functional.dropout(weights, p=call.dropout) @ value, weights


def _landmarks_of_keys(is_landmark: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    batch, kv_len = key.shape[0], key.shape[2]
    if is_landmark is None:
        return torch.zeros(batch, kv_len, dtype=torch.bool, device=key.device)
    if is_landmark.shape[0] != batch or is_landmark.shape[1] < kv_len:
        raise ValueError(
            f"is_landmark must mark the landmark keys and have the shape ({batch}, {kv_len}), got "
            f"{tuple(is_landmark.shape)}."
        )
    return is_landmark[:, :kv_len]


def _eager(call: LandmarkCall, found: None):
    return landmark_attention_eager(call)


def _torch(call: LandmarkCall, block_size: int):
    return landmark_attention_blockwise(call, block_size), None


def _triton(call: LandmarkCall, block_size: int):
    from ..kernels.landmark.triton import landmark_attention_triton

    return landmark_attention_triton(call, block_size), None


def _arguments(module: nn.Module, kwargs: dict) -> dict:
    is_landmark = kwargs.pop("is_landmark", None)
    return {
        "is_landmark": None if is_landmark is None else is_landmark.bool(),
        "block_size": kwargs.pop("landmark_block_size", None),
    }


LANDMARK = Mechanism(
    name="landmark",
    implementations=(
        Implementation("triton", _triton, check_triton, gpu_kernel=True),
        Implementation("torch", _torch, check_blockwise),
        Implementation("eager", _eager),
    ),
    call=LandmarkCall,
    arguments=_arguments,
    examples={
        "plain": lambda heads, kv_len: {},
        "regular": lambda heads, kv_len: {"is_landmark": (torch.arange(kv_len) % 6 == 5).expand(2, -1)},
        "regular_16": lambda heads, kv_len: {"is_landmark": (torch.arange(kv_len) % 16 == 15).expand(2, -1)},
        "anywhere": lambda heads, kv_len: {
            "is_landmark": torch.rand(2, kv_len, generator=torch.Generator().manual_seed(5)) < 0.2
        },
    },
)
