"""Attention in the layout of a plan, and all other layers in a balanced layout (arXiv 2509.21841).

The tokens of a batch, documents one after the other, are in one of two layouts. In the attention layout a rank has its shares
of the plan: of a document that `G` ranks share, rank `i` of the ring has one piece and its mirror image from the end, so that
causal attention is the same work for all of them. In the balanced layout all ranks have the same number of tokens; as few
tokens as possible are moved.
"""

import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import distributed

from ..blocks import Span
from ..exchange import Peers
from ..gathered import Route
from ..ring import Ring, ring_attention
from ..sharding import Sharding, shard_tensor, unshard_tensor
from .partition import Plan, PlanError
from .remap import Remap, plan_remap


_QUEUES = ("inter", "intra", "local")


class ZeppelinSchedule:
    """The layouts of a planned batch, and its attention.

    Args:
        plan: plan of the batch, for the ranks of the group.
        peers: the ranks.

    Attributes:
        attention: the attention layout.
        balanced: the layout with equal tokens.
        rings: of all ranks, in the order of the three queues: across nodes, inside nodes, local.

    Raises:
        PlanError: if the plan is for another number of ranks.
        ValueError: on all ranks, if they have different plans.
    """

    def __init__(self, plan: Plan, peers: Peers):
        peers.check_equal({"plan": zlib.crc32(repr(plan).encode())})
        if plan.num_ranks != peers.size:
            raise PlanError(
                f"The plan is for {plan.nodes} x {plan.gpus_per_node} = {plan.num_ranks} ranks, but the group has "
                f"{peers.size}."
            )
        self.plan, self.peers = plan, peers
        self.remapping: Remap = plan_remap(plan.tokens_per_rank, plan.gpus_per_node)
        bounds = (0, *accumulate(plan.lengths))
        order = sorted(range(len(plan.lengths)), key=lambda i: (_QUEUES.index(plan.zones[i]), i))
        spans: list[list[Span]] = [[] for _ in range(plan.num_ranks)]
        self._ring_spans: list[tuple[tuple[int, ...], list[list[Span]]]] = []
        local: dict[int, list[Span]] = {}
        for i in order:
            shares = plan.shares[i]
            if len(shares) == 1:
                local.setdefault(shares[0][0], []).append((bounds[i], bounds[i + 1]))
                continue
            pieces = zigzag_spans(bounds[i], [tokens for _, tokens in shares])
            ranks = tuple(rank for rank, _ in shares)
            self._ring_spans.append((ranks, pieces))
            for rank, piece in zip(ranks, pieces, strict=True):
                spans[rank] += piece
        for rank, documents in sorted(local.items()):
            self._ring_spans.append(((rank,), [documents]))
            spans[rank] += documents
        self.attention = Sharding(tuple(map(tuple, spans)), bounds[-1], bounds)
        self.balanced = Sharding(_moved(spans, self.remapping), bounds[-1], bounds)

    @cached_property
    def rings(self) -> list[Ring]:
        offsets = [0] * self.peers.size
        rings = []
        for ranks, pieces in self._ring_spans:
            bounds = []
            for rank, piece in zip(ranks, pieces, strict=True):
                size = sum(stop - start for start, stop in piece)
                bounds.append((offsets[rank], offsets[rank] + size))
                offsets[rank] += size
            rings.append(Ring(ranks, tuple(bounds), tuple(self.attention.rows(piece) for piece in pieces)))
        return rings

    @cached_property
    def _to_attention(self) -> Route:
        return Route.make(self.balanced.spans, self.attention.spans, self.peers.rank, self.balanced.length)

    def to_attention(self, states: torch.Tensor) -> torch.Tensor:
        """From the balanced layout to the attention layout; differentiable. Tokens are dimension 2 of four."""
        return self._to_attention.fetch(states, self.peers)

    def to_balanced(self, states: torch.Tensor) -> torch.Tensor:
        """From the attention layout to the balanced one; differentiable. Tokens are dimension 2 of four."""
        return self._to_balanced.fetch(states, self.peers)

    @cached_property
    def _to_balanced(self) -> Route:
        return Route.make(self.attention.spans, self.balanced.spans, self.peers.rank, self.balanced.length)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of tokens in the balanced layout `(1, heads, tokens, head_dim)`; the output has the same layout."""
        sizes = [query.shape[1], key.shape[1], value.shape[1]]
        if query.shape[-1] == value.shape[-1]:
            q, k, v = self.to_attention(torch.cat([query, key, value], 1)).split(sizes, 1)
        else:
            q, k, v = (self.to_attention(states) for states in (query, key, value))
        output, logsumexp = ring_attention(q, k, v, self.peers, self.rings, causal, scaling)
        return self.to_balanced(output), logsumexp


def zigzag_spans(start: int, tokens: Sequence[int]) -> list[list[Span]]:
    """A front and a back part for each rank of a ring: front parts in order, back parts in reverse order.

    Args:
        start: of the document in the batch.
        tokens: of each rank.
    """
    fronts = [-(-count // 2) for count in tokens]
    backs = [count - front for count, front in zip(tokens, fronts, strict=True)]
    ends = list(accumulate([*fronts, *reversed(backs)], initial=start))
    size = len(tokens)
    pieces = []
    for i in range(size):
        back = 2 * size - 1 - i
        spans = [(ends[i], ends[i + 1]), (ends[back], ends[back + 1])]
        pieces.append([span for span in spans if span[0] < span[1]])
    return pieces


def _moved(spans: Sequence[Sequence[Span]], remap: Remap) -> tuple[tuple[Span, ...], ...]:
    """The spans of each rank after the moves, which take the last tokens of a rank."""
    kept = [list(own) for own in spans]
    received: list[list[Span]] = [[] for _ in spans]
    for source, destination, count in remap.moves:
        while count:
            start, stop = kept[source].pop()
            taken = min(count, stop - start)
            if taken < stop - start:
                kept[source].append((start, stop - taken))
            received[destination].append((stop - taken, stop))
            count -= taken
    return tuple(tuple(own + new) for own, new in zip(kept, received, strict=True))


class ZeppelinEngine:
    """Exact attention over packed documents in the layout of a plan.

        engine = ZeppelinEngine(plan)
        states = engine.shard(states)                    # (tokens, ...) of all ranks -> of this one
        output = engine.attend(query, key, value)        # (tokens, heads, head_dim)
        balanced = engine.remap(output)                  # equal tokens on all ranks, for linear layers
        output = engine.unmap(balanced)

    Args:
        plan: plan of the batch; the same on all ranks.
        group: of processes; all by default.
        timeout: seconds to wait for other ranks.

    Raises:
        PlanError: if the plan is for another number of ranks.
        ValueError: on all ranks, if they have different plans.
        RuntimeError: if there is no process group.
    """

    def __init__(self, plan: Plan, group: distributed.ProcessGroup | None = None, timeout: float | None = None):
        self.schedule = ZeppelinSchedule(plan, Peers(group, timeout))

    def shard(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens of this rank in the attention layout, from a tensor `(all tokens, ...)`."""
        return shard_tensor(states, self.schedule.attention, self.schedule.peers.rank, dim=0)

    def unshard(self, states: torch.Tensor) -> torch.Tensor:
        """Gather all tokens in order from the attention layout; without gradients."""
        return unshard_tensor(states, self.schedule.attention, self.schedule.peers, dim=0)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        causal: bool = True,
        scaling: float | None = None,
    ) -> torch.Tensor:
        """Attention of each document to itself.

        Args:
            query: `(tokens, heads, head_dim)` of this rank, in the attention layout.
            key: `(tokens, kv_heads, head_dim)`.
            value: `(tokens, kv_heads, value_dim)`.
            causal: a token attends to itself and earlier tokens.
            scaling: of the logits; `head_dim ** -0.5` by default.
        """
        expected = self.schedule.attention.lengths[self.schedule.peers.rank]
        if not query.shape[0] == key.shape[0] == value.shape[0] == expected:
            raise ValueError(
                f"Query, key and value have {query.shape[0]}, {key.shape[0]} and {value.shape[0]} tokens, but the "
                f"plan gives rank {self.schedule.peers.rank} {expected}."
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
        output, _ = ring_attention(q, k, v, self.schedule.peers, self.schedule.rings, causal, scaling)
        return output[0].transpose(0, 1)

    def remap(self, states: torch.Tensor) -> torch.Tensor:
        """Move `(tokens, ...)` from the attention layout to the balanced one; differentiable."""
        return _of_tokens(self.schedule.to_balanced, states)

    def unmap(self, states: torch.Tensor) -> torch.Tensor:
        """Move `(tokens, ...)` from the balanced layout to the attention layout; differentiable."""
        return _of_tokens(self.schedule.to_attention, states)


def _of_tokens(move, states: torch.Tensor) -> torch.Tensor:
    moved = move(states.reshape(1, 1, len(states), states.shape[1:].numel()))[0, 0]
    return moved.reshape(len(moved), *states.shape[1:])
