"""Disentangled attention by SDPA with the position terms as a bias, made for one block of queries at a time.

For inference the bias of a block is never gathered pair by pair where that can be avoided: rows of the table are repeated in
the order of distance, and with the keys reversed the term of the queries is a strided view of that.
"""

import torch
from torch.nn import functional as F

from .eager import masked_out, position_scores


BLOCK = 128
#: elements of one block's bias that are worked on together; they should stay in the cache of a core
CHUNK = 1 << 18


def dense_disentangled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    index: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """As :func:`~hf_attn.kernels.disentangled.eager.eager_disentangled`, for any index, with gradients, in one piece."""
    bias = position_scores(query * scaling, key * scaling, position_key, position_query, index)
    if bias is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    bias = masked_out(bias, attention_mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)


def blockwise_disentangled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor | None,
    position_query: torch.Tensor | None,
    rows: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Self-attention without gradients, in memory that grows with the length and not with its square.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key: of the same shape.
        value: of the same shape.
        position_key: `(heads, number of rows, head_dim)` or none.
        position_query: `(heads, number of rows, head_dim)` or none.
        rows: row of every distance from 1 - length to length - 1, ascending, `(2 * length - 1,)`.
        attention_mask: boolean, `(batch, 1, 1 or length, length)` or none.
        scaling: factor of all terms.

    Returns:
        `(batch, heads, length, head_dim)`.
    """
    batch, heads, length, head_dim = query.shape
    consecutive = rows.shape[0] == (position_key if position_key is not None else position_query).shape[1]
    if position_key is not None:
        position_key = position_key * scaling
    if position_query is not None:
        position_query = position_query * scaling
    # With descending keys both the row of a pair and its place in memory grow with query and key: views need that.
    key, value = key.flip(2), value.flip(2)
    attention_mask = None if attention_mask is None else attention_mask.flip(-1)
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    block = min(BLOCK, length)
    head_step = max(1, min(heads, CHUNK // (block * length)))
    batch_step = max(1, CHUNK // (heads * block * length))
    for b in _slices(batch, batch_step):
        mask = attention_mask if attention_mask is None else attention_mask[b]
        for h in _slices(heads, head_step):
            keys, values = key[b, h], value[b, h]
            of_keys = None if position_query is None else position_query[h] @ keys.transpose(-1, -2)
            for q in _slices(length, block):
                queries = query[b, h, q]
                terms = []
                if position_key is not None:
                    terms.append(_of_queries(queries, position_key[h], rows, q.start, length, consecutive))
                if of_keys is not None:
                    terms.append(_of_keys(of_keys, queries.shape[2], rows, q.start, consecutive))
                # SDPA on a CPU takes a bias in float32 whatever the dtype of the queries.
                bias = terms[0].float() if query.dtype != torch.float64 else terms[0]
                bias = bias + terms[1] if len(terms) == 2 else bias
                if mask is not None:
                    bias = masked_out(bias, mask if mask.shape[2] == 1 else mask[:, :, q])
                output[b, h, q] = F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=bias, scale=scaling
                )
    return output


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _of_queries(queries, position_key, rows, start: int, length: int, consecutive: bool) -> torch.Tensor:
    """Term of the queries `start, start + 1, ...` and the keys in descending order, `(batch, heads, queries, length)`."""
    size = queries.shape[2]
    distances = slice(start, start + size + length - 1)
    if consecutive:
        by_distance = position_key[:, distances] @ queries.transpose(-1, -2)
    else:
        by_distance = (position_key @ queries.transpose(-1, -2)).index_select(2, rows[distances])
    # (distance, query) -> (query, key): one query on is one row and one column on, one key on is one row on
    shape = (*by_distance.shape[:2], size, length)
    return by_distance.as_strided(shape, (*by_distance.stride()[:2], size + 1, size))


def _of_keys(of_keys, size: int, rows, start: int, consecutive: bool) -> torch.Tensor:
    """Term of the keys, `(batch, heads, queries, length)`, from `of_keys` `(batch, heads, rows, length)`."""
    length = of_keys.shape[-1]
    if consecutive:
        shape = (*of_keys.shape[:2], size, length)
        strides = (*of_keys.stride()[:2], length, length + 1)
        return of_keys.as_strided(shape, strides, of_keys.storage_offset() + start * length)
    index = rows.unfold(0, length, 1)[start : start + size]
    return of_keys.gather(2, index.expand(*of_keys.shape[:2], -1, -1))
