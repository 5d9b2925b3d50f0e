"""Hash, fetch and weighted sum of memory layers (arXiv 2411.12992).

A vector of `num_tables` chunks of `code_length` channels picks one row of each table by the signs of its chunks:

    y = sum_k w(z_k) T_k[index(z_k)]

Nothing here is as large as (tokens, tables, width).
"""

import torch
from torch.autograd.function import once_differentiable


#: tables that one pass over many tokens reads; their rows stay in the cache of the processor
_TABLES_AT_ONCE = 16
_MANY_TOKENS = 64


def _product(factors: torch.Tensor) -> torch.Tensor:
    """Product over the last dimension. With gradients by halves: each step is one multiplication, and so is its backward."""
    if not factors.requires_grad:
        return factors.prod(-1)
    while (size := factors.shape[-1]) > 1:
        half = size // 2
        product = factors[..., :half] * factors[..., half : 2 * half]
        factors = product if size % 2 == 0 else torch.cat((product, factors[..., 2 * half :]), -1)
    return factors[..., 0]


def hash_chunks(
    hidden_states: torch.Tensor, code_length: int, bucket_weight: str = "l1_scaled", temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights of vectors.

    Args:
        hidden_states: `(tokens, channels)`. Chunk k are channels `k * code_length` and on.
        code_length: channels of a chunk.
        bucket_weight: `"probability"`, that of the bucket among all, `prod_i 1 / (1 + exp(-2 |z_i| / temperature))`, or
            `"l1_scaled"`, the same at temperature 1 times `sum_i |z_i|`.
        temperature: of the probability.

    Returns:
        Rows of the tables stacked on each other, int64, `(tokens, tables)`, and weights of that shape in at least float32.
        The first channel is the most significant bit; 0 counts as positive. Gradients flow through the weights.
    """
    chunks = hidden_states.unflatten(-1, (-1, code_length))
    num_tables = chunks.shape[-2]
    device = chunks.device
    powers = 2.0 ** torch.arange(code_length - 1, -1, -1, device=device)
    starts = torch.arange(0, num_tables << code_length, 1 << code_length, device=device)
    rows = starts + ((chunks >= 0).float() @ powers).long()
    size = chunks.to(torch.promote_types(chunks.dtype, torch.float32)).abs()
    unlikelihood = _product((size * (-2 / temperature)).exp() + 1)
    return rows, (size.sum(-1) / unlikelihood if bucket_weight == "l1_scaled" else unlikelihood.reciprocal())


def plain_lookup(rows: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The sum, computed directly; needs memory for (tokens, tables, width)."""
    return (weights[..., None].to(tables.dtype) * tables[rows]).sum(-2)


def lookup(rows: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor, sparse: bool = False) -> torch.Tensor:
    """Weighted sum of the rows of each token.

    Args:
        rows, weights: of [`hash_chunks`], `(tokens, tables)`; ascending blocks of rows.
        tables: `(num_tables * 2**code_length, width)`.
        sparse: whether the gradient of the tables is a sparse tensor of the rows that were used.

    Returns:
        `(tokens, width)` in the dtype of the tables.
    """
    weights = weights.to(tables.dtype)
    if torch.is_grad_enabled() and (weights.requires_grad or tables.requires_grad):
        return _Lookup.apply(rows, weights, tables, sparse)
    return _gather(rows, weights, tables)


def _gather(rows: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    bag = torch.nn.functional.embedding_bag
    if rows.shape[0] < _MANY_TOKENS or rows.shape[1] <= _TABLES_AT_ONCE:
        return bag(rows, tables, mode="sum", per_sample_weights=weights)
    output = None
    for some_rows, some in zip(rows.split(_TABLES_AT_ONCE, 1), weights.split(_TABLES_AT_ONCE, 1), strict=True):
        part = bag(some_rows.contiguous(), tables, mode="sum", per_sample_weights=some.contiguous())
        output = part if output is None else output.add_(part)
    return output


class _Lookup(torch.autograd.Function):
    """The sum and its gradients. That of a table row is a weighted sum of gradients of tokens: an embedding bag again, over
    the tokens sorted by row."""

    @staticmethod
    def forward(ctx, rows, weights, tables, sparse):
        ctx.save_for_backward(rows, weights, tables)
        ctx.sparse = sparse
        return _gather(rows, weights, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, weights, tables = ctx.saved_tensors
        upstream = upstream.contiguous()
        of_weights = of_tables = None
        if ctx.needs_input_grad[1]:
            of_weights = _gradient_of_weights(rows, tables, upstream)
        if ctx.needs_input_grad[2]:
            of_tables = gradient_of_tables(rows, weights, tables, upstream, ctx.sparse)
        return None, of_weights, of_tables, None


def _gradient_of_weights(rows: torch.Tensor, tables: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """`upstream_n . T[rows_nk]`, with what autograd uses for the weights of an embedding bag."""
    parts = []
    for some_rows in rows.split(_TABLES_AT_ONCE, 1):
        tokens, count = some_rows.shape
        offsets = torch.arange(0, tokens * count, count, device=rows.device)
        token_of = torch.arange(tokens, device=rows.device).repeat_interleave(count)
        parts.append(
            torch.ops.aten._embedding_bag_per_sample_weights_backward(
                upstream, tables, some_rows.reshape(-1), offsets, token_of, 0
            ).view(tokens, count)
        )
    return torch.cat(parts, 1)


def gradient_of_tables(
    rows: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor, upstream: torch.Tensor, sparse: bool = False
) -> torch.Tensor:
    """Gradient of the tables: to each row the weighted sum of the gradients `(tokens, width)` of the tokens that used it."""
    sorted_rows, order = rows.T.reshape(-1).sort()
    token_of = order % rows.shape[0]
    weights = weights.T.reshape(-1)[order]
    if sparse:
        used, counts = sorted_rows.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
    else:
        offsets = torch.searchsorted(sorted_rows, torch.arange(tables.shape[0], device=rows.device))
    gradient = torch.nn.functional.embedding_bag(
        token_of, upstream, offsets, mode="sum", per_sample_weights=weights.contiguous()
    )
    if sparse:
        return torch.sparse_coo_tensor(used[None], gradient, tables.shape, is_coalesced=True, check_invariants=False)
    return gradient
