"""Hierarchical partitioning: which ranks hold which part of each sequence (arXiv 2509.21841).

A sequence is in one of three zones. *local*: one GPU has the whole sequence, and nothing is communicated; *intra*: GPUs of one
node share it, in a ring within the node; *inter*: several nodes share it, with all of their GPUs. The partition starts with
everything local and, as long as a capacity is exceeded, moves the longest sequence one zone up.

Everything is integer arithmetic on the list of lengths, so every rank computes the same plan from the same list.
"""

import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

from ..pieces import pieces


ZONES = ("local", "intra", "inter")


class PlanError(ValueError):
    """A batch that cannot be planned, or a plan that does not fit; the message suggests a solution."""


@dataclass(frozen=True)
class Plan:
    """The placement of the tokens of a batch during attention.

    Attributes:
        lengths: tokens of each sequence.
        nodes: number of nodes.
        gpus_per_node: ranks of a node; the global rank is `node * gpus_per_node + gpu`.
        capacity: maximum number of tokens per GPU.
        inter_threshold: sequences of at least this length are shared by nodes (`s1`).
        intra_thresholds: of each node: sequences of at least this length are shared by its GPUs (`s0`).
        zones: of each sequence: `"local"`, `"intra"` or `"inter"`.
        shares: of each sequence: `(rank, tokens)` of the ranks that share it, in the order of their ring.
    """

    lengths: tuple[int, ...]
    nodes: int
    gpus_per_node: int
    capacity: int
    inter_threshold: int
    intra_thresholds: tuple[int, ...]
    zones: tuple[str, ...]
    shares: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def tokens_per_rank(self) -> list[int]:
        """Tokens of each rank during attention."""
        tokens = [0] * self.num_ranks
        for shares in self.shares:
            for rank, count in shares:
                tokens[rank] += count
        return tokens

    @property
    def quadratic_load_per_rank(self) -> list[float]:
        """Sum of `length ** 2 / ranks of its ring` over the sequences of each rank."""
        load = [0.0] * self.num_ranks
        for length, shares in zip(self.lengths, self.shares, strict=True):
            for rank, _ in shares:
                load[rank] += length**2 / len(shares)
        return load

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan written by [`save`]."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tuples = {name: tuple(content[name]) for name in ("lengths", "intra_thresholds", "zones")}
        shares = tuple(tuple((rank, count) for rank, count in shares) for shares in content["shares"])
        return cls(**{**content, **tuples, "shares": shares})


def default_capacity(lengths: Sequence[int], ranks: int, slack: float = 0.15) -> int:
    """Tokens per rank that a batch needs plus 15%, so that few sequences have to be shared."""
    return max(1, math.ceil((1 + slack) * sum(lengths) / ranks))


def partition(lengths: Sequence[int], nodes: int, gpus_per_node: int, capacity: int) -> Plan:
    """Partition a batch over nodes, and each node's part over its GPUs.

    A GPU may exceed the capacity by at most one token per shared sequence, if even splitting every sequence leaves
    no room for rounding.

    Args:
        lengths: tokens of each sequence, at least 1.
        nodes: number of nodes.
        gpus_per_node: GPUs of a node.
        capacity: maximum number of tokens per GPU. With just enough for the batch, most sequences become rings; 10-25% more is
            better.

    Raises:
        PlanError: for lengths below 1, an empty cluster, or more tokens than the capacity of the cluster.
    """
    lengths = _whole(lengths)
    _check(lengths, nodes, gpus_per_node, capacity)
    # Sequences are visited longest first, those of equal length by index.
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    inter_threshold, node_shares, node_sequences = _over_nodes(lengths, order, nodes, gpus_per_node * capacity)

    zones = ["inter" if i in node_shares else "local" for i in range(len(lengths))]
    shares: list[list[tuple[int, int]]] = [[] for _ in lengths]
    thresholds = []
    for node in range(nodes):
        inter = [
            (i, node_shares[i][node], len(node_shares[i]))
            for i in order
            if i in node_shares and node in node_shares[i]
        ]
        threshold, parts = _over_gpus(lengths, inter, node_sequences[node], gpus_per_node, capacity)
        thresholds.append(threshold)
        for i, gpus in parts.items():
            shares[i] += [(node * gpus_per_node + gpu, tokens) for gpu, tokens in gpus]
        for i in node_sequences[node]:
            if lengths[i] >= threshold and gpus_per_node > 1:
                zones[i] = "intra"
    return Plan(
        lengths=lengths,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        capacity=capacity,
        inter_threshold=inter_threshold,
        intra_thresholds=tuple(thresholds),
        zones=tuple(zones),
        shares=tuple(tuple(part) for part in shares),
    )


def even_partition(lengths: Sequence[int], nodes: int, gpus_per_node: int) -> Plan:
    """Every sequence shared by all ranks: plain context parallelism, for comparison.

    Raises:
        PlanError: as [`partition`].
    """
    lengths = _whole(lengths)
    ranks = nodes * gpus_per_node
    capacity = sum(-(-length // ranks) for length in lengths)
    _check(lengths, nodes, gpus_per_node, capacity)
    zone = "local" if ranks == 1 else "intra" if nodes == 1 else "inter"
    shares = tuple(tuple((r, n) for r, n in enumerate(pieces(length, ranks)) if n) for length in lengths)
    return Plan(lengths, nodes, gpus_per_node, capacity, 1, (1,) * nodes, (zone,) * len(lengths), shares)


def _whole(lengths: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(lengths, Iterable) or not all(isinstance(length, Integral) for length in lengths):
        raise PlanError(f"The lengths of sequences are a list of whole numbers, got {lengths!r}.")
    return tuple(map(int, lengths))


def _check(lengths: tuple[int, ...], nodes: int, gpus_per_node: int, capacity: int) -> None:
    for name, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node), ("capacity", capacity)):
        if not isinstance(value, Integral) or value < 1:
            raise PlanError(f"{name} must be a whole number, at least 1, got {value!r}.")
    if not lengths:
        raise PlanError("There are no sequences to plan: the list of lengths is empty.")
    empty = [i for i, length in enumerate(lengths) if length < 1]
    if empty:
        raise PlanError(f"Every sequence needs at least one token; sequence {empty[0]} has {lengths[empty[0]]}.")
    ranks, total = nodes * gpus_per_node, sum(lengths)
    if total > ranks * capacity:
        raise PlanError(
            f"The batch has {total} tokens, and {ranks} GPUs with a capacity of {capacity} take at most "
            f"{ranks * capacity}. A capacity of {math.ceil(total / ranks)} would just do, "
            f"{default_capacity(lengths, ranks)} leaves a margin of 15% for balancing."
        )


def _over_nodes(lengths, order, nodes, capacity) -> tuple[int, dict[int, dict[int, int]], list[list[int]]]:
    """Threshold, tokens of each shared sequence on each node, and the whole sequences of each node."""
    threshold, even, shared = capacity + 1, False, 0
    while True:
        while nodes > 1 and shared < len(order) and lengths[order[shared]] >= threshold:
            shared += 1
        total = sum(lengths[i] for i in order[:shared])
        load = [0] * nodes
        node_shares = {}
        for i in order[:shared]:
            count = nodes if even else min(nodes, max(2, -(-lengths[i] * nodes // total)))
            chosen = sorted(sorted(range(nodes), key=lambda n: (load[n], n))[:count])
            node_shares[i] = dict(zip(chosen, pieces(lengths[i], count), strict=True))
            for node, tokens in node_shares[i].items():
                load[node] += tokens
        if max(load) > capacity and not even:
            even = True
            continue
        whole = [[] for _ in range(nodes)]
        least = [(tokens, node) for node, tokens in enumerate(load)]
        heapq.heapify(least)
        for i in order[shared:]:
            tokens, node = least[0]
            if tokens + lengths[i] > capacity:
                break
            heapq.heapreplace(least, (tokens + lengths[i], node))
            whole[node].append(i)
        else:
            return threshold, node_shares, whole
        threshold = lengths[order[shared]]


def _over_gpus(lengths, inter, order, gpus, capacity) -> tuple[int, dict[int, list[tuple[int, int]]]]:
    """Threshold of a node, and tokens on each GPU of each sequence on the node."""
    # Quadratic loads are multiples of 1 / scale.
    scale = math.lcm(*(ring_nodes * gpus for _, _, ring_nodes in inter), *range(1, gpus + 1))
    start_tokens, start_quad, start_parts = [0] * gpus, 0, {}
    for i, share, ring_nodes in inter:
        start_parts[i] = list(enumerate(pieces(share, gpus)))
        start_tokens = [tokens + piece for tokens, (_, piece) in zip(start_tokens, start_parts[i], strict=True)]
        start_quad += lengths[i] ** 2 * scale // (ring_nodes * gpus)

    threshold, even, shared = capacity + 1, False, 0
    while True:
        while gpus > 1 and shared < len(order) and lengths[order[shared]] >= threshold:
            shared += 1
        total = sum(lengths[i] ** 2 for i in order[:shared])
        tokens, quad, parts = list(start_tokens), [start_quad] * gpus, dict(start_parts)
        for i in order[:shared]:
            square = lengths[i] ** 2
            count = gpus if even else min(gpus, max(2, -(-square * gpus // total)))
            chosen = sorted(sorted(range(gpus), key=lambda g: (quad[g], tokens[g], g))[:count])
            parts[i] = list(zip(chosen, pieces(lengths[i], count), strict=True))
            for gpu, piece in parts[i]:
                tokens[gpu] += piece
                quad[gpu] += square * scale // count
        if max(tokens) > capacity and not even:
            even = True
            continue
        for i in order[shared:]:
            length = lengths[i]
            best = min(((quad[g], tokens[g], g) for g in range(gpus) if tokens[g] + length <= capacity), default=None)
            if best is None:
                break
            gpu = best[2]
            tokens[gpu] += length
            quad[gpu] += length**2 * scale
            parts[i] = [(gpu, length)]
        else:
            return threshold, parts
        threshold = lengths[order[shared]]
