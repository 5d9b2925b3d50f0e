"""The plan `logsparse`: one batched call of PyTorch's attention over blocks of 32 queries.

All queries of a block see the same long spans, one for each set bit of the block's number, and inside of the block the same
pattern of tokens and short spans.
"""

import torch
from torch.nn import functional as F

from .call import CombinerCall
from .plan import levels, make_plan
from .softmax import attend, local_expectations


#: queries of a block, a power of two
BLOCK = 32


def attend_logsparse(call: CombinerCall) -> torch.Tensor:
    """Output `(batch, heads, length, head_dim)` of sequences.

    Args:
        call: a sequence in each row, as many heads of keys as of queries.
    """
    batch, heads, length, _ = call.query.shape
    block = min(BLOCK, 1 << levels(length))
    blocks = -(-length // block)
    query, key, value = call.query, call.key, call.value
    if missing := blocks * block - length:
        query, key, value = (F.pad(states, (0, 0, 0, missing)) for states in (query, key, value))
    number = torch.arange(blocks, device=query.device)
    block_levels = levels(block)
    keys, values = [key.unflatten(2, (blocks, block))], [value.unflatten(2, (blocks, block))]
    shown = []
    pooled_query, pooled_key = query, key
    for level in range(1, levels(length)):
        # Twice as long spans from pairs of spans.
        pooled_query, pooled_key = _larger_of_pairs(pooled_query), _larger_of_pairs(pooled_key)
        # Only the first span of a pair is ever seen from outside of itself.
        span_key = pooled_key[:, :, ::2]
        span_value = _local_expectations(pooled_query[:, :, ::2], key, value, level, call.scaling)
        if level < block_levels:
            keys.append(span_key.unflatten(2, (blocks, -1)))
            values.append(span_value.unflatten(2, (blocks, -1)))
        else:
            bit = level - block_levels
            pair = (number >> (bit + 1)).clamp(max=span_key.shape[2] - 1)
            keys.append(span_key[:, :, pair, None])
            values.append(span_value[:, :, pair, None])
            shown.append(((number >> bit) & 1).bool())

    inside = _pattern_of_block(block, query.device)
    outside = torch.stack(shown, dim=1) if shown else number.new_zeros(blocks, 0, dtype=torch.bool)
    mask = torch.cat((inside.expand(blocks, -1, -1), outside[:, None].expand(-1, block, -1)), dim=2)
    output = attend(
        query.unflatten(2, (blocks, block)).flatten(0, 1),
        torch.cat(keys, dim=3).flatten(0, 1),
        torch.cat(values, dim=3).flatten(0, 1),
        allowed=mask[None],
        scaling=call.scaling,
    )
    return output.reshape(batch, heads, blocks * block, -1)[:, :, :length]


def _larger_of_pairs(states: torch.Tensor) -> torch.Tensor:
    """Maxima over pairs of neighbours; of equal ones the first gets the gradient, as from `Tensor.max`.

    The mask that is kept for the backward pass takes an eighth of the memory of indices.
    """
    pairs = states.shape[2] // 2
    first, second = states[:, :, : 2 * pairs].unflatten(2, (pairs, 2)).unbind(3)
    return torch.where((second > first) | second.isnan(), second, first)


def _local_expectations(span_query, key, value, level: int, scaling: float) -> torch.Tensor:
    """Values of the spans `(batch, heads, spans, head_dim)`: the first of each pair of spans of `2 ** level` tokens."""
    size = 1 << level
    # Windows are views: a copy for each level, kept for the backward pass, would be most of the memory.
    members = (states.unfold(2, size, 2 * size).transpose(-1, -2) for states in (key, value))
    return local_expectations(span_query, *members, scaling)


def _pattern_of_block(block: int, device: torch.device) -> torch.Tensor:
    """What the queries of a block see of its tokens and of its spans of 2 tokens or more, `(block, block + spans)`."""
    plan = make_plan("logsparse", block, block, is_causal=True, device=device)
    singles = plan.members.sum(1) == 1
    tokens = plan.direct | (plan.uses[:, singles].float() @ plan.members[singles].float()).bool()
    return torch.cat((tokens, plan.uses[:, ~singles]), dim=1)
