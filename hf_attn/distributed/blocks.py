"""Allowed pairs of a rank's queries and a set of keys, as rectangles and triangles instead of an L x L mask.

Tokens are identified by their index in the whole sequence. A [`Run`] is a piece of consecutive tokens of one document that
a rank stores contiguously. For two runs of the same document there are two cases: all queries see all keys, or (causal) a
corner of the rectangle is cut off along the diagonal.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


#: `(start, stop)`
Span = tuple[int, int]


class Run(NamedTuple):
    """Consecutive tokens of a document.

    Attributes:
        document: index of the document.
        start: index of the first token in the whole sequence.
        stop: index after the last one.
        offset: position of the first token in the local tensor.
    """

    document: int
    start: int
    stop: int
    offset: int


class Block(NamedTuple):
    """Queries `[q_start, q_stop)` that attend to keys `[k_start, k_stop)`, or (`triangle`) to those up to their position."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    triangle: bool


class Rows(NamedTuple):
    """Rows of a batch with the same padding, and the position of their tokens: `(first row, after the last)` and runs."""

    span: Span
    runs: tuple[Run, ...]


def runs_of(spans: Iterable[Span], visible: Sequence[tuple[int, int, int]]) -> tuple[Run, ...]:
    """Runs of a tensor that contains `spans` of the sequence one after the other.

    Args:
        spans: of the whole sequence.
        visible: `(start, stop, document)` in ascending order; tokens in none of them are padding.
    """
    runs: list[Run] = []
    offset = 0
    for start, stop in spans:
        for first, last, document in visible:
            a, b = max(start, first), min(stop, last)
            if a < b:
                run = Run(document, a, b, offset + a - start)
                previous = runs[-1] if runs else None
                if previous and (previous.document, previous.stop) == (document, a) and _ends(previous) == run.offset:
                    runs[-1] = previous._replace(stop=b)
                else:
                    runs.append(run)
        offset += stop - start
    return tuple(runs)


def _ends(run: Run) -> int:
    return run.offset + run.stop - run.start


def pair_blocks(queries: Iterable[Run], keys: Iterable[Run], causal: bool) -> list[Block]:
    """All allowed pairs of queries and keys, each pair once; adjacent blocks are joined."""
    by_document = defaultdict(list)
    for key in keys:
        by_document[key.document].append(key)
    blocks = [
        block
        for query in queries
        for key in by_document.get(query.document, ())
        for block in _pair(query, key, causal)
    ]
    return _joined(_joined(blocks, along_keys=True), along_keys=False)


def _pair(query: Run, key: Run, causal: bool) -> Iterable[Block]:
    q_end, k_end = _ends(query), _ends(key)
    if not causal:
        yield Block(query.offset, q_end, key.offset, k_end, False)
        return
    # The overlap of the two, if any, is a triangle.
    first, last = max(query.start, key.start), min(query.stop, key.stop)
    before = min(key.stop, query.start)
    if key.start < before:
        yield Block(query.offset, q_end, key.offset, key.offset + before - key.start, False)
    if first < last:
        q_first, k_first, size = query.offset + first - query.start, key.offset + first - key.start, last - first
        yield Block(q_first, q_first + size, k_first, k_first + size, True)
        if last < query.stop:
            yield Block(q_first + size, q_end, k_first, k_first + size, False)


def _joined(blocks: list[Block], along_keys: bool) -> list[Block]:
    result: list[Block] = []
    for block in blocks:
        last = result[-1] if result else None
        if last and not (last.triangle or block.triangle):
            if along_keys and last[:2] == block[:2] and last.k_stop == block.k_start:
                result[-1] = last._replace(k_stop=block.k_stop)
                continue
            if not along_keys and last[2:4] == block[2:4] and last.q_stop == block.q_start:
                result[-1] = last._replace(q_stop=block.q_stop)
                continue
        result.append(block)
    return result


def visible_spans(cu_seqlens: Sequence[int], mask: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """`(start, stop, document)` of the tokens that are not padding.

    Args:
        cu_seqlens: first token of each document, and the length of the sequence.
        mask: boolean `(length,)`, False for padding.
    """
    documents = [(a, b, i) for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens)) if a < b]
    if mask is None or bool(mask.all()):
        return documents
    changes = torch.diff(
        mask.to(torch.int8), prepend=mask.new_zeros(1).to(torch.int8), append=mask.new_zeros(1).to(torch.int8)
    )
    starts, stops = (changes == 1).nonzero().flatten().tolist(), (changes == -1).nonzero().flatten().tolist()
    return [
        (max(a, start), min(b, stop), document)
        for start, stop in zip(starts, stops, strict=True)
        for a, b, document in documents
        if max(a, start) < min(b, stop)
    ]
