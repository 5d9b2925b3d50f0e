"""Ring attention: keys and values are passed around the ranks that hold the queries; rings of several sizes run concurrently.

Rank `i` of a ring of `G` computes on its own block first, then on that of rank `i - 1`, `i - 2`, ... The block of the next round is
sent while a round computes. In the backward pass the gradients of a block are passed along with it, and end on its own rank.
Messages go between pairs of ranks, so no process group is created for a ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .blocks import Rows, pair_blocks
from .exchange import Message, Peers
from .local import Accumulator, RowBlocks, accumulation_dtype, attend, attend_backward


@dataclass
class Ring:
    """Ranks that share some tokens.

    Attributes:
        ranks: ranks of the group, in the order of the ring.
        bounds: for each rank, the bounds of the shared tokens in its local tensor.
        rows: for each rank, the positions of its tokens relative to the first one.
    """

    ranks: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    rows: tuple[Sequence[Rows], ...]
    _blocks: dict = field(default_factory=dict, repr=False)

    def blocks(self, query: int, key: int, causal: bool) -> RowBlocks:
        """Allowed pairs of the queries at one position of the ring and the keys at another position."""
        found = self._blocks.get((query, key, causal))
        if found is None:
            pairs = zip(self.rows[query], self.rows[key], strict=True)
            found = [(q.span, pair_blocks(q.runs, k.runs, causal)) for q, k in pairs]
            self._blocks[query, key, causal] = found
        return found

    def tokens(self, place: int) -> int:
        start, stop = self.bounds[place]
        return stop - start


class _Place:
    """A ring, from the perspective of one rank."""

    def __init__(self, ring: Ring, rank: int):
        self.ring, self.size = ring, len(ring.ranks)
        self.place = ring.ranks.index(rank)
        self.slice = slice(*ring.bounds[self.place])
        self.next, self.previous = (ring.ranks[(self.place + step) % self.size] for step in (1, -1))

    def source(self, turn: int) -> int:
        """Place in the ring whose block is on this rank in a round."""
        return (self.place - turn) % self.size

    def message(self, block: torch.Tensor | None, turn: int, like: torch.Tensor) -> Message:
        """Message that sends the block of this round and receives the next one; `like` is `(parts, batch, heads, tokens, dim)`."""
        shape = (*like.shape[:3], self.ring.tokens(self.source(turn + 1)), like.shape[4])
        return Message(self.next, block, self.previous, shape, like.dtype, like.device)


def _stacked(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Keys and values in one tensor, sent as one message; values may have another width."""
    if key.shape[-1] == value.shape[-1]:
        return torch.stack([key, value])
    return torch.cat([key, value], -1)[None]


def _unstacked(both: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return both.unbind() if len(both) == 2 else both[0].split([key_dim, both.shape[-1] - key_dim], -1)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, peers: Peers, rings: Sequence[Ring], causal: bool, scaling: float):
        places = [_Place(ring, peers.rank) for ring in rings if peers.rank in ring.ranks]
        blocks = [_stacked(key[:, :, p.slice], value[:, :, p.slice]) for p in places]
        accumulator = Accumulator(query, value.shape[-1])
        for turn in range(max((p.size for p in places), default=0)):
            moving = [i for i, p in enumerate(places) if turn + 1 < p.size]
            pending = peers.start([places[i].message(blocks[i], turn, blocks[i]) for i in moving])
            for p, block in zip(places, blocks, strict=True):
                if turn < p.size:
                    k, v = _unstacked(block, key.shape[-1])
                    seen = p.ring.blocks(p.place, p.source(turn), causal)
                    attend(accumulator, query[:, :, p.slice], k, v, seen, scaling, p.slice.start)
            for i, block in zip(moving, pending.wait(), strict=True):
                blocks[i] = block
        output, logsumexp = accumulator.result()
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.peers, ctx.places, ctx.causal, ctx.scaling = peers, places, causal, scaling
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad_output, _):
        query, key, value, output, logsumexp = ctx.saved_tensors
        peers, places = ctx.peers, ctx.places
        dtype = accumulation_dtype(query.dtype)
        grad_query, grad_key, grad_value = (x.new_zeros(x.shape, dtype=dtype) for x in (query, key, value))
        blocks = [_stacked(key[:, :, p.slice], value[:, :, p.slice]) for p in places]
        gradients = [block.new_zeros(block.shape, dtype=dtype) for block in blocks]
        returning, arriving = [], None
        for turn in range(max((p.size for p in places), default=0)):
            moving = [i for i, p in enumerate(places) if turn + 1 < p.size]
            pending = peers.start([places[i].message(blocks[i], turn, blocks[i]) for i in moving])
            own = [
                torch.zeros_like(block, dtype=dtype) if turn < p.size else None
                for p, block in zip(places, blocks, strict=True)
            ]
            for p, block, gradient in zip(places, blocks, own, strict=True):
                if gradient is None:
                    continue
                k, v = _unstacked(block, key.shape[-1])
                parts = (grad_query[:, :, p.slice], *_unstacked(gradient, key.shape[-1]))
                q, g, o, lse = (x[:, :, p.slice] for x in (query, grad_output, output, logsumexp))
                seen = p.ring.blocks(p.place, p.source(turn), ctx.causal)
                attend_backward(parts, g, q, k, v, o, lse, seen, ctx.scaling)
            if arriving is not None:
                for i, gradient in zip(returning, arriving.wait(), strict=True):
                    gradients[i] = gradient
            for i, gradient in enumerate(own):
                if gradient is not None:
                    gradients[i] = gradients[i] + gradient
            for i, block in zip(moving, pending.wait(), strict=True):
                blocks[i] = block
            # After the last round the gradients are one step from their own rank.
            returning = [i for i, p in enumerate(places) if turn < p.size and p.size > 1]
            arriving = peers.start([places[i].message(gradients[i], turn, gradients[i]) for i in returning])
        if arriving is not None:
            for i, gradient in zip(returning, arriving.wait(), strict=True):
                gradients[i] = gradient
        for p, gradient in zip(places, gradients, strict=True):
            grad_k, grad_v = _unstacked(gradient, key.shape[-1])
            grad_key[:, :, p.slice], grad_value[:, :, p.slice] = grad_k, grad_v
        found = (x.to(y.dtype) for x, y in ((grad_query, query), (grad_key, key), (grad_value, value)))
        return *found, None, None, None, None


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    peers: Peers,
    rings: Sequence[Ring],
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of the tokens of all rings.

    Args:
        query: `(batch, heads, tokens, head_dim)` of this rank.
        key: `(batch, kv_heads, tokens, head_dim)`.
        value: `(batch, kv_heads, tokens, value_dim)`.
        peers: the ranks.
        rings: the same list on all ranks, in the order in which they should start.
        causal: a token attends to itself and earlier tokens of its document, otherwise to its whole document.
        scaling: of the logits.

    Returns:
        Output `(batch, heads, tokens, value_dim)`, and log-sum-exp of the logits `(batch, heads, tokens)` without gradients. Tokens of no ring
        and padding get zeros and -inf.
    """
    return _RingAttention.apply(query, key, value, peers, rings, causal, scaling)
