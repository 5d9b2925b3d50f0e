"""Layouts in which ranks fetch the tokens that they need: all queries, all keys, or a block of each.

query  all keys and values come to the own queries
key    all queries come to the own keys and values; partial results go back and are merged
grid   rank `i * columns + j` has the queries of block `i` and the keys of block `j`; partial results go back and are merged
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .blocks import Span, pair_blocks
from .exchange import Peers, exchange
from .local import Accumulator, RowBlocks, accumulation_dtype, attend, attend_backward
from .sharding import Sharding, span_indices, split_spans


def grid_shape(ranks: int, grid: Sequence[int] | None) -> tuple[int, int]:
    """`(query blocks, key blocks)`; by default as square as possible.

    Raises:
        ValueError: if their product is not the number of ranks.
    """
    if grid is None:
        rows = max(n for n in range(1, int(ranks**0.5) + 1) if ranks % n == 0)
        return rows, ranks // rows
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != ranks:
        raise ValueError(f"A grid of {rows} x {columns} needs {rows * columns} ranks, but the group has {ranks}.")
    return rows, columns


def wanted_spans(
    layout: str, sharding: Sharding, split: str = "contiguous", grid: Sequence[int] | None = None
) -> list[tuple[tuple[Span, ...], tuple[Span, ...]]]:
    """The queries and the keys on which each rank computes, as spans of the whole sequence."""
    everything = ((0, sharding.length),)
    if layout == "query":
        return [(own, everything) for own in sharding.spans]
    if layout == "key":
        return [(everything, own) for own in sharding.spans]
    rows, columns = grid_shape(sharding.ranks, grid)
    queries, keys = split_spans(sharding.length, rows, split), split_spans(sharding.length, columns, split)
    return [(queries[rank // columns], keys[rank % columns]) for rank in range(sharding.ranks)]


@dataclass
class Route:
    """Exchange of tokens between their owners and the ranks that need them.

    Attributes:
        send: for each rank, positions in the local tensor of the tokens that it receives.
        receive: for each rank, positions in the fetched tensor of the tokens that it sends.
    """

    send: list[torch.Tensor]
    receive: list[torch.Tensor]

    @classmethod
    def make(
        cls, owned: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]], rank: int, length: int
    ) -> "Route":
        """The route of a rank.

        Args:
            owned: spans of each rank's local tensor; together every token once.
            wanted: spans of each rank's fetched tensor.
            rank: rank whose route it is.
            length: of the whole sequence.
        """
        owner, place = (torch.empty(length, dtype=torch.int64) for _ in range(2))
        for other, spans in enumerate(owned):
            tokens = span_indices(spans)
            owner[tokens] = other
            place[tokens] = torch.arange(len(tokens))
        send = []
        for spans in wanted:
            tokens = span_indices(spans)
            send.append(place[tokens[owner[tokens] == rank]])
        owners = owner[span_indices(wanted[rank])]
        return cls(send, [(owners == other).nonzero().flatten() for other in range(len(owned))])

    def reversed(self) -> "Route":
        return Route(self.receive, self.send)

    def fetch(self, tensor: torch.Tensor, peers: Peers) -> torch.Tensor:
        """Fetch the wanted tokens (dimension 2); differentiable."""
        parts = self.split(tensor)
        shapes = [(*tensor.shape[:2], len(places), *tensor.shape[3:]) for places in self.receive]
        received = torch.cat(exchange(peers, parts, shapes), 2)
        order = torch.cat(self.receive).to(tensor.device)
        if bool((order[1:] > order[:-1]).all()):
            return received
        return received.index_select(2, order.argsort())

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The part of a local tensor for each rank."""
        return [_selected(tensor, places) for places in self.send]

    def give_back(self, fetched: torch.Tensor, peers: Peers) -> list[torch.Tensor]:
        """Return values for fetched tokens to their owners. Gives the values of each rank for tokens of this rank, see `send`."""
        shapes = [(*fetched.shape[:2], len(places), *fetched.shape[3:]) for places in self.send]
        return peers.exchange([_selected(fetched, places) for places in self.receive], shapes)

    def summed(self, fetched: torch.Tensor, peers: Peers, num_local: int) -> torch.Tensor:
        """Sum over ranks of their values for each local token."""
        total = fetched.new_zeros((*fetched.shape[:2], num_local, *fetched.shape[3:]))
        for places, part in zip(self.send, self.give_back(fetched, peers), strict=True):
            total.index_add_(2, places.to(total.device), part)
        return total


def _selected(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if len(places) and bool((places[1:] - places[:-1] == 1).all()):
        return tensor.narrow(2, int(places[0]), len(places))
    return tensor.index_select(2, places.to(tensor.device))


@dataclass
class Gathering:
    """The tokens that a rank fetches and its part of the computation, in one of the layouts of this module.

    Attributes:
        sharding: of the sequence.
        layout: `"query"`, `"key"` or `"grid"`.
        split: rule for the blocks of a grid.
        grid: query blocks and key blocks.
        rank: this rank.
    """

    sharding: Sharding
    layout: str
    split: str
    grid: tuple[int, int] | None
    rank: int
    _blocks: dict = field(default_factory=dict, repr=False)

    @cached_property
    def wanted(self):
        return wanted_spans(self.layout, self.sharding, self.split, self.grid)

    @cached_property
    def queries(self) -> Route:
        return Route.make(
            self.sharding.spans, [queries for queries, _ in self.wanted], self.rank, self.sharding.length
        )

    @cached_property
    def keys(self) -> Route:
        return Route.make(self.sharding.spans, [keys for _, keys in self.wanted], self.rank, self.sharding.length)

    def blocks(self, causal: bool) -> RowBlocks:
        if causal not in self._blocks:
            queries, keys = (self.sharding.rows(spans) for spans in self.wanted[self.rank])
            pairs = zip(queries, keys, strict=True)
            self._blocks[causal] = [(q.span, pair_blocks(q.runs, k.runs, causal)) for q, k in pairs]
        return self._blocks[causal]


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, peers: Peers, gathering: Gathering, causal: bool, scaling: float):
        queries, keys = gathering.queries, gathering.keys
        q, k, v = queries.fetch(query, peers), keys.fetch(key, peers), keys.fetch(value, peers)
        partial = Accumulator(q, value.shape[-1])
        attend(partial, q, k, v, gathering.blocks(causal), scaling)
        output, logsumexp = partial.result()
        if gathering.layout != "query":
            # The log-sum-exp is sent as one more channel, in its own precision.
            both = torch.cat([output.to(logsumexp.dtype), logsumexp[..., None]], -1)
            merged = Accumulator(query, value.shape[-1])
            for places, part in zip(queries.send, queries.give_back(both, peers), strict=True):
                for first, last, start in _consecutive(places):
                    piece = part[:, :, start : start + last - first]
                    merged.add((0, None), (first, last), piece[..., :-1], piece[..., -1])
            output, logsumexp = merged.result()
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.peers, ctx.gathering, ctx.causal, ctx.scaling = peers, gathering, causal, scaling
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad_output, _):
        query, key, value, output, logsumexp = ctx.saved_tensors
        peers, gathering = ctx.peers, ctx.gathering
        queries, keys = gathering.queries, gathering.keys
        q, g, o, lse = (queries.fetch(x, peers) for x in (query, grad_output, output, logsumexp))
        k, v = keys.fetch(key, peers), keys.fetch(value, peers)
        dtype = accumulation_dtype(query.dtype)
        gradients = tuple(x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
        attend_backward(gradients, g, q, k, v, o, lse, gathering.blocks(ctx.causal), ctx.scaling)
        found = [
            route.summed(gradient, peers, x.shape[2]).to(x.dtype)
            for route, gradient, x in zip((queries, keys, keys), gradients, (query, key, value), strict=True)
        ]
        return *found, None, None, None, None


def _consecutive(places: torch.Tensor) -> list[tuple[int, int, int]]:
    """Ascending positions as contiguous pieces `(first, after the last, index of the first)`."""
    if not len(places):
        return []
    cuts = [0, *((places[1:] - places[:-1] != 1).nonzero().flatten() + 1).tolist(), len(places)]
    return [(int(places[a]), int(places[b - 1]) + 1, a) for a, b in itertools.pairwise(cuts)]


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    peers: Peers,
    gathering: Gathering,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention in the layouts of this module; for arguments and results see [`.ring.ring_attention`]."""
    return _GatheredAttention.apply(query, key, value, peers, gathering, causal, scaling)
