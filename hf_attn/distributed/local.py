"""Attention to a part of the keys with its log-sum-exp, and merging of such partial results.

For disjoint sets of keys with outputs `o_p` and log-sum-exps `lse_p` of their logits

    lse = log sum_p exp(lse_p),    o = sum_p exp(lse_p - lse) o_p

is attention to all of them. The backward pass of attention to a part, given `o` and `lse` of the whole, yields that part's
contribution to the gradients (arXiv 2307.08691, section 3.1). torch's fused kernels compute both; without a fused kernel,
tiles of queries are computed one after the other. The map of all queries and keys is never in memory.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .blocks import Block, Span


#: number of logits that are in memory at a time without a fused kernel
TILE_ELEMENTS = 2**22

#: blocks of each group of rows: `((first row, after the last), blocks)`
RowBlocks = Sequence[tuple[Span, Sequence[Block]]]


_listeners: list[Callable[[float], None]] = []


def add_work_listener(listener: Callable[[float], None]) -> None:
    """Register a function that is called with the CPU seconds of each part of the work."""
    _listeners.append(listener)


def remove_work_listener(listener: Callable[[float], None]) -> None:
    """Undo [`add_work_listener`]."""
    _listeners.remove(listener)


@contextmanager
def _work() -> Iterator[None]:
    if not _listeners:
        yield
        return
    start = time.process_time()
    yield
    for listener in _listeners:
        listener(time.process_time() - start)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class Accumulator:
    """Merges partial results for the queries of a rank, in float32 or wider.

    Args:
        query: `(batch, heads, queries, head_dim)`, for shape and device.
        value_dim: of the output.
    """

    def __init__(self, query: torch.Tensor, value_dim: int):
        self._query = query
        self._shape = (*query.shape[:3], value_dim)
        self.output: torch.Tensor | None = None
        self.logsumexp: torch.Tensor | None = None

    def add(self, rows: Span, queries: Span, output: torch.Tensor, logsumexp: torch.Tensor) -> None:
        """Merge the result of some rows and queries into the accumulated result."""
        if self.output is None and output.shape == self._shape:
            self.output, self.logsumexp = output, logsumexp
            return
        dtype = accumulation_dtype(self._query.dtype)
        if self.output is None:
            self.output = self._query.new_zeros(self._shape, dtype=dtype)
            self.logsumexp = self._query.new_full(self._shape[:3], -torch.inf, dtype=dtype)
        elif self.output.dtype != dtype:
            self.output = self.output.to(dtype)
        where = (slice(*rows), slice(None), slice(*queries))
        old = self.logsumexp[where]
        new = torch.logaddexp(old, logsumexp)
        # A query without keys in this part and in all earlier parts.
        nothing = new == -torch.inf
        share, old_share = (torch.exp(x - new).masked_fill_(nothing, 0.0)[..., None] for x in (logsumexp, old))
        self.output[where] = self.output[where] * old_share + output * share
        self.logsumexp[where] = new

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the dtype of the query and log-sum-exp; zeros and -inf for queries that saw no key."""
        if self.output is None:
            dtype = accumulation_dtype(self._query.dtype)
            return self._query.new_zeros(self._shape), self._query.new_full(self._shape[:3], -torch.inf, dtype=dtype)
        return self.output.to(self._query.dtype), self.logsumexp


def attend(
    accumulator: Accumulator,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: RowBlocks,
    scaling: float,
    offset: int = 0,
) -> None:
    """Add attention to some keys to an accumulator.

    Args:
        accumulator: of results; its first query is `offset` before that of `query`.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, kv_heads, keys, head_dim)`.
        value: `(batch, kv_heads, keys, value_dim)`.
        blocks: allowed pairs of queries and keys.
        scaling: of the logits.
        offset: see `accumulator`.
    """
    with _work():
        _attend(accumulator, query, key, value, blocks, scaling, offset)


def _attend(accumulator, query, key, value, blocks, scaling, offset) -> None:
    for rows, group in blocks:
        for block in group:
            q, k, v = _parts(rows, block, query, key, value)
            # torch's kernel divides by these sizes.
            if q.numel() == 0:
                continue
            output, logsumexp = _forward(q, k, v, block.triangle, scaling)
            accumulator.add(rows, (offset + block.q_start, offset + block.q_stop), output, logsumexp)


def attend_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    blocks: RowBlocks,
    scaling: float,
) -> None:
    """Add the contribution of these keys to the gradients of query, key and value.

    Args:
        gradients: of query, key and value, in float32 or wider.
        grad_output: of the output.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, kv_heads, keys, head_dim)`.
        value: `(batch, kv_heads, keys, value_dim)`.
        output: of these queries, merged over all keys.
        logsumexp: of these queries, over all keys.
        blocks: allowed pairs of queries and keys.
        scaling: of the logits.
    """
    with _work():
        _attend_backward(gradients, grad_output, query, key, value, output, logsumexp, blocks, scaling)


def _attend_backward(gradients, grad_output, query, key, value, output, logsumexp, blocks, scaling) -> None:
    for rows, group in blocks:
        for block in group:
            q, k, v = _parts(rows, block, query, key, value)
            if q.numel() == 0:
                continue
            queries = (slice(*rows), slice(None), slice(block.q_start, block.q_stop))
            keys = (slice(*rows), slice(None), slice(block.k_start, block.k_stop))
            found = _backward(
                grad_output[queries], q, k, v, output[queries], logsumexp[queries], block.triangle, scaling
            )
            for gradient, where, part in zip(gradients, (queries, keys, keys), found, strict=True):
                gradient[where] += part


def _parts(rows, block, query, key, value):
    keys = slice(block.k_start, block.k_stop)
    rows = slice(*rows)
    return query[rows, :, block.q_start : block.q_stop], key[rows, :, keys], value[rows, :, keys]


def _folded(query: torch.Tensor, *others: torch.Tensor, kv_heads: int) -> list[torch.Tensor]:
    """`(batch, heads, ...)` as `(batch * kv_heads, heads of the group, ...)`: grouped heads need no copies of keys."""
    return [x.reshape(x.shape[0] * kv_heads, x.shape[1] // kv_heads, *x.shape[2:]) for x in (query, *others)]


def _forward(query, key, value, triangle, scaling):
    kv_heads = key.shape[1]
    (q,) = _folded(query, kv_heads=kv_heads)
    k, v = (x.reshape(-1, 1, *x.shape[2:]).expand(-1, q.shape[1], -1, -1) for x in (key, value))
    output, logsumexp = _kernel_of(q, v)[0](q, k, v, triangle, scaling)
    return output.reshape(*query.shape[:3], -1), logsumexp.reshape(query.shape[:3])


def _backward(grad_output, query, key, value, output, logsumexp, triangle, scaling):
    kv_heads = key.shape[1]
    q, g, o, lse = _folded(query, grad_output, output, logsumexp, kv_heads=kv_heads)
    k, v = (x.reshape(-1, 1, *x.shape[2:]).expand(-1, q.shape[1], -1, -1) for x in (key, value))
    grad_q, grad_k, grad_v = _kernel_of(q, v)[1](g, q, k, v, o, lse, triangle, scaling)
    grad_k, grad_v = (x.sum(1).reshape(y.shape) for x, y in ((grad_k, key), (grad_v, value)))
    return grad_q.reshape(query.shape), grad_k, grad_v


def _kernel_of(query: torch.Tensor, value: torch.Tensor):
    same = query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and same:
        return _cpu_forward, _cpu_backward
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and same and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        return _cuda_forward, _cuda_backward
    return _tiled_forward, _tiled_backward


def _cpu_forward(query, key, value, triangle, scaling):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, triangle, scale=scaling)


def _cpu_backward(grad_output, query, key, value, output, logsumexp, triangle, scaling):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad_output, query, key, value, output, logsumexp, 0.0, triangle, scale=scaling)


def _cuda_forward(query, key, value, triangle, scaling):
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, triangle, False, scale=scaling)
    return found[0], found[1]


def _cuda_backward(grad_output, query, key, value, output, logsumexp, triangle, scaling):
    # Without dropout the state of the generator does not matter.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad_output, query, key, value, output, logsumexp, None, None, query.shape[2], key.shape[2]),
        *(0.0, triangle, state, state[0]),
        scale=scaling,
    )


def _tiles(queries: int, keys: int):
    size = max(1, TILE_ELEMENTS // max(1, keys))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _logits(query, key, start, stop, triangle, scaling):
    dtype = accumulation_dtype(query.dtype)
    logits = query[:, :, start:stop].to(dtype) @ key.to(dtype).transpose(-1, -2) * scaling
    if triangle:
        places = torch.arange(start, stop, device=query.device)[:, None]
        logits = logits.masked_fill(torch.arange(key.shape[2], device=query.device) > places, -torch.inf)
    return logits


def _tiled_forward(query, key, value, triangle, scaling):
    outputs, sums = [], []
    for start, stop in _tiles(query.shape[2], key.shape[2]):
        logits = _logits(query, key, start, stop, triangle, scaling)
        sums.append(logits.logsumexp(-1))
        outputs.append(torch.exp(logits - sums[-1][..., None]) @ value.to(logits.dtype))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _tiled_backward(grad_output, query, key, value, output, logsumexp, triangle, scaling):
    dtype = accumulation_dtype(query.dtype)
    grad_q = query.new_empty(query.shape, dtype=dtype)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (key, value))
    for start, stop in _tiles(query.shape[2], key.shape[2]):
        here = (slice(None), slice(None), slice(start, stop))
        weights = torch.exp(_logits(query, key, start, stop, triangle, scaling) - logsumexp[here][..., None])
        grad, out = grad_output[here].to(dtype), output[here].to(dtype)
        grad_v += weights.transpose(-1, -2) @ grad
        # dS = P * (dP - rowsum(dO * O))
        grad_logits = weights * (grad @ value.to(dtype).transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
        grad_q[here] = grad_logits @ key.to(dtype) * scaling
        grad_k += grad_logits.transpose(-1, -2) @ query[here].to(dtype) * scaling
    return grad_q, grad_k, grad_v
