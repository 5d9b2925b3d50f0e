"""Layouts in which a rank has whole sequences and a part of the heads.

Heads are distributed in groups that share a key/value head; the first ranks may have one group more. If there are more ranks than
groups, the last ranks have no heads and only pass tokens on.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .blocks import pair_blocks
from .exchange import Peers, exchange
from .local import Accumulator, RowBlocks, accumulation_dtype, attend, attend_backward
from .sharding import Sharding, split_spans


def head_spans(num_heads: int, ranks: int) -> list[tuple[int, int]]:
    """`(first head, after the last)` of each rank."""
    return [span for (span,) in split_spans(num_heads, ranks, "contiguous")]


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks: RowBlocks, scaling: float):
        accumulator = Accumulator(query, value.shape[-1])
        if query.shape[1]:
            attend(accumulator, query, key, value, blocks, scaling)
        output, logsumexp = accumulator.result()
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.blocks, ctx.scaling = blocks, scaling
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad_output, _):
        query, key, value, output, logsumexp = ctx.saved_tensors
        dtype = accumulation_dtype(query.dtype)
        gradients = tuple(x.new_zeros(x.shape, dtype=dtype) for x in (query, key, value))
        if query.shape[1]:
            attend_backward(gradients, grad_output, query, key, value, output, logsumexp, ctx.blocks, ctx.scaling)
        return *(x.to(query.dtype) for x in gradients), None, None


def local_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: RowBlocks, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on one rank, with its log-sum-exp."""
    return _LocalAttention.apply(query, key, value, blocks, scaling)


def whole_blocks(sharding: Sharding, causal: bool) -> RowBlocks:
    """Allowed pairs if this rank has all tokens, in order."""
    return [(rows.span, pair_blocks(rows.runs, rows.runs, causal)) for rows in sharding.rows([(0, sharding.length)])]


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    peers: Peers,
    sharding: Sharding,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All-to-all from a part of the tokens with all heads to all tokens with a part of the heads, and back for the output.

    For arguments and results see [`~hf_attn.distributed.ring.ring_attention`].
    """
    kv_spans = head_spans(key.shape[1], peers.size)
    groups = query.shape[1] // key.shape[1]
    query_spans = [(start * groups, stop * groups) for start, stop in kv_spans]
    q = _to_heads(query, query_spans, peers, sharding)
    k, v = (_to_heads(states, kv_spans, peers, sharding) for states in (key, value))
    output, logsumexp = local_attention(q, k, v, whole_blocks(sharding, causal), scaling)
    logsumexp = _to_tokens(logsumexp[..., None], query_spans, peers, sharding)[..., 0]
    return _to_tokens(output, query_spans, peers, sharding), logsumexp


def _order(sharding: Sharding, device) -> torch.Tensor:
    return torch.cat([sharding.indices(rank) for rank in range(sharding.ranks)]).to(device)


def _to_heads(states: torch.Tensor, spans: Sequence[tuple[int, int]], peers: Peers, sharding: Sharding):
    own = spans[peers.rank]
    parts = [states[:, start:stop] for start, stop in spans]
    shapes = [(states.shape[0], own[1] - own[0], length, states.shape[3]) for length in sharding.lengths]
    return torch.cat(exchange(peers, parts, shapes), 2).index_select(2, _order(sharding, states.device).argsort())


def _to_tokens(states: torch.Tensor, spans: Sequence[tuple[int, int]], peers: Peers, sharding: Sharding):
    parts = states.index_select(2, _order(sharding, states.device)).split(list(sharding.lengths), 2)
    length = sharding.lengths[peers.rank]
    shapes = [(states.shape[0], stop - start, length, states.shape[3]) for start, stop in spans]
    return torch.cat(exchange(peers, parts, shapes), 1)


class _Replicate(torch.autograd.Function):
    """A tensor that is the same on all ranks, each of which uses a part of it: gradients are summed."""

    @staticmethod
    def forward(ctx, peers: Peers, tensor):
        ctx.peers = peers
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.peers.all_reduce(gradient.clone())


class _Sum(torch.autograd.Function):
    """Sum over ranks, all of which use the result: the gradient is the same on all of them."""

    @staticmethod
    def forward(ctx, peers: Peers, tensor):
        return peers.all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


class _GatherHeads(torch.autograd.Function):
    """Gather the heads of all ranks, all of which use the result."""

    @staticmethod
    def forward(ctx, peers: Peers, spans, heads):
        ctx.span = spans[peers.rank]
        shapes = [(heads.shape[0], stop - start, *heads.shape[2:]) for start, stop in spans]
        return torch.cat(peers.exchange([heads] * peers.size, shapes), 1)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, gradient[:, slice(*ctx.span)]


def replicated_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    peers: Peers,
    sharding: Sharding,
    causal: bool,
    scaling: float,
) -> torch.Tensor:
    """Attention for ranks that have the whole sequence: each computes a part of the heads, and gets all of them.

    Everything before and after is the same on all ranks, and so are its gradients.
    """
    kv_spans = head_spans(key.shape[1], peers.size)
    groups = query.shape[1] // key.shape[1]
    spans = [(start * groups, stop * groups) for start, stop in kv_spans]
    q = _Replicate.apply(peers, query)[:, slice(*spans[peers.rank])]
    k, v = (_Replicate.apply(peers, states)[:, slice(*kv_spans[peers.rank])] for states in (key, value))
    output, _ = local_attention(q, k, v, whole_blocks(sharding, causal), scaling)
    return _GatherHeads.apply(peers, spans, output)


def project_heads(output: torch.Tensor, projection: nn.Linear, peers: Peers) -> tuple[torch.Tensor, torch.Tensor]:
    """Output projection in the head layout: a slice of the weight for this rank's heads, then the sum over ranks.

    Args:
        output: `(batch, heads of this rank, length, head_dim)`.
        projection: the whole `W^o`, the same on all ranks; its bias is added once.
        peers: the ranks.

    Returns:
        `(batch, length, hidden)`, the same on all ranks, and this rank's contribution to the sum.
    """
    sizes = [heads * output.shape[3] for (heads,) in peers.all_gather_integers([output.shape[1]])]
    if sum(sizes) != projection.in_features:
        raise ValueError(
            f"The heads of all ranks have {sum(sizes)} channels in total, but the projection takes "
            f"{projection.in_features}."
        )
    weight = projection.weight[:, sum(sizes[: peers.rank]) : sum(sizes[: peers.rank + 1])]
    contribution = nn.functional.linear(output.transpose(1, 2).flatten(2), weight)
    total = _Sum.apply(peers, contribution)
    return (total if projection.bias is None else total + projection.bias), contribution
