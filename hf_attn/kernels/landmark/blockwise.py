"""Landmark attention with regular blocks, a block of queries at a time, in plain PyTorch: memory linear in the length.

For the queries of one block a whole earlier block is one entry of the softmax, with its landmark's score as logit and
``sum_j softmax_block(s)_j v_j`` as value (arXiv 2305.16300, the fused form). The backward pass computes each block of
queries again.
"""

import torch
from torch.utils.checkpoint import checkpoint


def landmark_attention_blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    is_landmark: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal landmark attention; :func:`supports_landmark_blockwise` says what it serves.

    The arguments are those of :func:`hf_attn.attention.landmark.landmark_attention_eager`.

    Returns:
        ``(batch, heads, q_len, value_dim)``.
    """
    heads, q_len = query.shape[1:3]
    kv_heads, kv_len = key.shape[1:3]
    block_size = landmark_block_size(is_landmark, kv_len)
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))

    first, outputs = kv_len - q_len, []
    for start in range(first - first % block_size, kv_len, block_size):
        rows = slice(max(start, first) - first, min(start + block_size, kv_len) - first)
        end = rows.stop + first
        mask = None if attention_mask is None else attention_mask[..., :end]
        if mask is not None:
            mask = (mask[..., rows, :] if mask.shape[-2] > 1 else mask).unsqueeze(1)
        arguments = (grouped[..., rows, :], key[:, :, :end], value[:, :, :end], mask, start, block_size, scaling)
        if needs_grad:
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


def landmark_block_size(is_landmark: torch.Tensor | None, kv_len: int) -> int | None:
    """Size of the blocks if they are regular: every row has its landmarks at the ends of blocks of one size, counted from
    the first key. One block more than long enough if there are none; `None` if the blocks are not regular."""
    if is_landmark is None:
        return kv_len + 1
    is_landmark = is_landmark[:, :kv_len]
    found = is_landmark[:1].nonzero()
    if len(found) == 0:
        return None if is_landmark.any() else kv_len + 1
    size = int(found[0, 1]) + 1
    regular = torch.arange(1, kv_len + 1, device=is_landmark.device) % size == 0
    return size if size > 1 and bool((is_landmark == regular).all()) else None


def supports_landmark_blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_landmark: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    output_weights: bool = False,
    **arguments,
) -> tuple[bool, str]:
    """Whether :func:`landmark_attention_blockwise` can serve a call, and why not."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if dropout:
        return False, f"it does not drop attention weights, and dropout={dropout} is asked for"
    if output_weights:
        return False, "it never holds the attention weights, which are asked for"
    if not query.dtype == key.dtype == value.dtype:
        return False, (f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if torch.compiler.is_compiling():
        return False, "it looks at the positions of the landmarks, which a compiled graph does not know"
    if q_len > kv_len:
        return False, f"there are more queries ({q_len}) than keys ({kv_len})"
    if sliding_window is not None:
        return False, "it has no sliding window"
    if is_landmark is not None and (is_landmark.shape[0] != query.shape[0] or is_landmark.shape[1] < kv_len):
        return False, f"is_landmark must have the shape ({query.shape[0]}, {kv_len}), got {tuple(is_landmark.shape)}"
    if landmark_block_size(is_landmark, kv_len) is None:
        return False, "the landmarks are not at the ends of blocks of one size, counted from the first key"
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            return False, "the mask is additive, and it takes boolean ones"
        expanded = attention_mask.expand(*attention_mask.shape[:-2], q_len, kv_len)
        if attention_mask.shape[1] != 1:
            return False, "the mask differs between heads"
        if not is_causal and bool(expanded.triu(kv_len - q_len + 1).any()):
            return False, "it is causal, and the mask allows later keys"
    elif not is_causal and q_len > 1:
        return False, "it is causal, and the call is not"
    return True, ""
