"""Costs of distributed attention for a rank: bytes sent, by formulas of the layouts, and CPU seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .functional import Schedule
from .heads import head_spans
from .local import accumulation_dtype, add_work_listener, remove_work_listener


def forward_bytes(
    schedule: Schedule,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that a rank sends in the forward pass of one attention layer.

    With `t` tokens of a rank, `L` of all and `P` ranks of equal shares, for `W` bytes of a token's keys and values: ring and query
    `(P - 1) t W`; key: the queries `(P - 1) t` and partial outputs with their log-sum-exp, in float32, of `L - t` tokens; Ulysses: what of
    the own tokens belongs to heads elsewhere, and the output of the own heads of `L - t` tokens.

    Args:
        schedule: of the batch.
        batch: rows.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        dtype: of the tensors.
    """
    sharding, rank, ranks = schedule.sharding, schedule.peers.rank, schedule.peers.size
    own, all_tokens = sharding.lengths[rank], sharding.length
    value, partial = batch * head_dim * dtype.itemsize, accumulation_dtype(dtype).itemsize * batch
    if schedule.layout == "ring":
        return sum(sharding.lengths[(rank - turn) % ranks] for turn in range(ranks - 1)) * 2 * kv_heads * value
    if schedule.layout == "ulysses":
        start, stop = head_spans(kv_heads, ranks)[rank]
        own_kv, own_heads = stop - start, (stop - start) * heads // kv_heads
        there = own * (heads - own_heads + 2 * (kv_heads - own_kv)) * value
        return there + (all_tokens - own) * own_heads * (value + partial)
    gathering = schedule.gathering

    def elsewhere(places) -> int:
        return sum(len(part) for other, part in enumerate(places) if other != rank)

    sent = elsewhere(gathering.queries.send) * heads * value + elsewhere(gathering.keys.send) * 2 * kv_heads * value
    if schedule.layout != "query":
        sent += elsewhere(gathering.queries.receive) * heads * (head_dim + 1) * partial
    return sent


@dataclass
class Work:
    """CPU seconds that this process has spent on partial attention, without waiting for other processes."""

    seconds: float = 0.0


@contextmanager
def measure_attention() -> Iterator[Work]:
    """Context that sums the CPU seconds of this process's attention, forward and backward."""
    work = Work()

    def listen(seconds: float) -> None:
        work.seconds += seconds

    add_work_listener(listen)
    try:
        yield work
    finally:
        remove_work_listener(listen)


def idle_shares(seconds: list[float]) -> list[float]:
    """Fraction of the time in which each rank waits for the busiest one."""
    longest = max(seconds)
    return [1 - own / longest if longest else 0.0 for own in seconds]
