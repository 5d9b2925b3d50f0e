"""Disentangled attention by SDPA with the position terms as a bias.

For inference the bias is computed block by block and not gathered pair by pair: where rows of the table follow the distance, a
product of tokens with rows holds the bias of its pairs along its diagonals, which is a strided view.
"""

import torch
from torch.nn import functional as F

from .call import DisentangledCall
from .eager import masked_out, position_scores


#: queries (in a short text queries or keys) whose position terms are made together
BLOCK, SHORT_BLOCK = 128, 64
#: elements of a bias that are worked on together; they should stay in the cache of a core
CHUNK = 1 << 18
#: longest text whose bias is made at once for each head
SHORT = 512


def dense_disentangled(call: DisentangledCall) -> torch.Tensor:
    """Any call, with gradients, without blocks."""
    scaling, bias = call.scaling, None
    if call.has_positions:
        bias = position_scores(call.query * scaling, call.key * scaling, *call.positions, call.row_of_pairs())
    mask = call.attention_mask if bias is None else masked_out(bias, call.attention_mask)
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=mask, dropout_p=call.dropout, scale=scaling
    )


def blockwise_disentangled(call: DisentangledCall) -> torch.Tensor:
    """Self-attention without gradients and dropout, in memory that grows with the length and not with its square.

    The call has `rows` and one of the position terms at least.
    """
    query, key, value, attention_mask, scaling = call.query, call.key, call.value, call.attention_mask, call.scaling
    position_key, position_query, rows = *call.positions, call.rows
    batch, heads, length, _ = query.shape
    if position_key is not None:
        position_key = position_key * scaling
    if position_query is not None:
        position_query = position_query * scaling
    if length <= SHORT:
        attend, at_once, table_rows = _attend_short, length * length, ()
        # One row for each distance, in the order in which the tokens of a block meet them.
        position_key = None if position_key is None else position_key.index_select(1, rows.flip(0))
        position_query = None if position_query is None else position_query.index_select(1, rows)
    else:
        attend, at_once, table_rows = _attend_long, min(BLOCK, length) * length, (rows,)
        # With descending keys both the row of a pair and its place in memory grow with query and key: views need that.
        key, value = key.flip(2), value.flip(2)
        attention_mask = None if attention_mask is None else attention_mask.flip(-1)
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    for b in _slices(batch, CHUNK // (heads * at_once)):
        mask = None if attention_mask is None else attention_mask[b]
        for h in _slices(heads, CHUNK // at_once):
            of_heads = (None if table is None else table[h] for table in (position_key, position_query))
            attend(query[b, h], key[b, h], value[b, h], *of_heads, *table_rows, mask, scaling, output[b, h])
    return output


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _wide(query: torch.Tensor) -> torch.dtype:
    # On a CPU, SDPA accepts a float32 bias for queries of any dtype; elsewhere the dtypes must be equal.
    return torch.promote_types(query.dtype, torch.float32) if query.device.type == "cpu" else query.dtype


def _attend_short(query, key, value, position_key, position_query, mask, scaling, output) -> None:
    """A short text; position_key has a row for each distance, the largest first, position_query the smallest first."""
    length = query.shape[2]
    bias = query.new_empty(*query.shape[:2], length, length, dtype=_wide(query))
    for block in _slices(length, SHORT_BLOCK):
        # The distances of these tokens to all others, in either direction.
        distances = slice(length - block.stop, 2 * length - 1 - block.start)
        if position_key is not None:
            bias[:, :, block] = _diagonals(query[:, :, block] @ position_key[:, distances].transpose(-1, -2), length)
    for block in _slices(length, SHORT_BLOCK):
        distances = slice(length - block.stop, 2 * length - 1 - block.start)
        if position_query is not None:
            term = _diagonals(key[:, :, block] @ position_query[:, distances].transpose(-1, -2), length).transpose(
                2, 3
            )
            if position_key is None:
                bias[..., block] = term
            else:
                bias[..., block] += term
    output.copy_(F.scaled_dot_product_attention(query, key, value, attn_mask=masked_out(bias, mask), scale=scaling))


def _diagonals(by_distance: torch.Tensor, length: int) -> torch.Tensor:
    """`(..., tokens, distances)` -> `(..., tokens, length)`: the window of distances moves back by one with every token."""
    tokens, distances = by_distance.shape[-2:]
    strides = (*by_distance.stride()[:2], distances - 1, 1)
    return by_distance.as_strided((*by_distance.shape[:2], tokens, length), strides, tokens - 1)


def _attend_long(query, key, value, position_key, position_query, rows, mask, scaling, output) -> None:
    """A text of any length, by blocks of queries; keys, values and the mask are in descending order here."""
    length = query.shape[2]
    of_keys = None if position_query is None else position_query @ key.transpose(-1, -2)
    for block in _slices(length, BLOCK):
        queries = query[:, :, block]
        bias = None
        if position_key is not None:
            bias = _of_queries(queries, position_key, rows[block.start : block.stop + length - 1], length).to(
                _wide(query)
            )
        if of_keys is not None:
            index = rows.unfold(0, length, 1)[block]
            term = of_keys.gather(2, index.expand(*of_keys.shape[:2], -1, -1))
            bias = term.to(_wide(query)) if bias is None else bias + term
        if mask is not None:
            bias = masked_out(bias, mask if mask.shape[2] == 1 else mask[:, :, block])
        output[:, :, block] = F.scaled_dot_product_attention(queries, key, value, attn_mask=bias, scale=scaling)


def _of_queries(queries, position_key, rows, length: int) -> torch.Tensor:
    """Term of a block of queries and the keys in descending order, `(batch, heads, queries, length)`.

    Args:
        rows: of the distances from the first query and the last key up, `(queries + length - 1,)`.
    """
    size = queries.shape[2]
    by_distance = (position_key @ queries.transpose(-1, -2)).index_select(2, rows)
    # (distance, query) -> (query, key): one query on is one row and one column on, one key on is one row on
    shape = (*by_distance.shape[:2], size, length)
    return by_distance.as_strided(shape, (*by_distance.stride()[:2], size + 1, size))
