"""Landmark attention with regular blocks, a block of queries at a time, in plain PyTorch: memory linear in the length.

For the queries of one block a whole earlier block is one entry of the softmax, with its landmark's score as logit and
`sum_j softmax_block(s)_j v_j` as value (arXiv 2305.16300, the fused form). The backward pass computes each block of
queries again.
"""

import torch
from torch.utils.checkpoint import checkpoint

from .call import LandmarkCall


def landmark_attention_blockwise(call: LandmarkCall, block_size: int) -> torch.Tensor:
    """Causal landmark attention with regular blocks.

    Args:
        call: one that [`hf_attn.kernels.landmark.call.check_blockwise`] does not refuse.
        block_size: what that returned.

    Returns:
        Output `(batch, heads, q_len, value_dim)`.
    """
    query, key, value, attention_mask, scaling = call.query, call.key, call.value, call.attention_mask, call.scaling
    heads, q_len = query.shape[1:3]
    kv_heads, kv_len = key.shape[1:3]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))

    first, outputs = kv_len - q_len, []
    for start in range(first - first % block_size, kv_len, block_size):
        rows = slice(max(start, first) - first, min(start + block_size, kv_len) - first)
        end = rows.stop + first
        mask = None if attention_mask is None else attention_mask[..., :end]
        if mask is not None:
            mask = (mask[..., rows, :] if mask.shape[-2] > 1 else mask).unsqueeze(1)
        arguments = (grouped[..., rows, :], key[:, :, :end], value[:, :, :end], mask, start, block_size, scaling)
        if call.needs_gradient:
            outputs.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*arguments))
    return torch.cat(outputs, dim=3).flatten(1, 2) if outputs else query.new_zeros(*query.shape[:3], value.shape[-1])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    block_size: int,
    scaling: float,
) -> torch.Tensor:
    """Attention of the last tokens of the keys, which are in the block that begins at `start`.

    Args:
        query: `(batch, kv_heads, group, rows, head_dim)`.
        key, value: `(batch, kv_heads, length, head_dim)`, up to and including the queries.
        mask: boolean, broadcastable to `(batch, kv_heads, group, rows, length)`.
    """
    group, rows = query.shape[2:4]
    length = key.shape[2]
    scores = query.flatten(2, 3) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)).unflatten(2, (group, rows)) * scaling

    position = torch.arange(length, device=query.device)
    allowed = position <= position[length - rows :, None]
    # The own landmark is the last token of a complete block, and only it could see itself.
    own_allowed = allowed[:, start:] & (position[start:] % block_size != block_size - 1)
    if mask is not None:
        own_allowed = own_allowed & mask[..., start:]
    minimum = torch.finfo(scores.dtype).min
    own_scores = scores[..., start:].masked_fill(~own_allowed, minimum)

    earlier = start // block_size
    if earlier == 0:
        weights = own_scores.softmax(-1).masked_fill(~own_allowed, 0.0)
        return _times(weights, value)

    blocks = scores[..., :start].unflatten(-1, (earlier, block_size))
    inside, gates = blocks[..., :-1], blocks[..., -1]
    if mask is not None:
        block_mask = mask[..., :start].unflatten(-1, (earlier, block_size))
        inside_allowed, gate_allowed = block_mask[..., :-1], block_mask[..., -1]
        inside = inside.masked_fill(~inside_allowed, minimum).softmax(-1).masked_fill(~inside_allowed, 0.0)
        gates = gates.masked_fill(~gate_allowed, minimum)
    else:
        inside = inside.softmax(-1)

    own_weights = torch.cat([gates, own_scores], dim=-1).softmax(-1)
    gates, own_weights = own_weights[..., :earlier], own_weights[..., earlier:].masked_fill(~own_allowed, 0.0)
    if mask is not None:
        gates = gates.masked_fill(~gate_allowed, 0.0)
    landmarks = torch.zeros_like(gates)[..., None]
    earlier_weights = torch.cat([inside * gates[..., None], landmarks], dim=-1).flatten(-2)
    return _times(torch.cat([earlier_weights, own_weights], dim=-1), value)


def _times(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (weights.to(value.dtype).flatten(2, 3) @ value).unflatten(2, weights.shape[2:4])
