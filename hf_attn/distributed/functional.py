"""Exact softmax attention over a sequence that is split over ranks (arXiv 2302.06218)."""

import zlib
from collections.abc import Sequence

import torch
from torch import distributed

from .blocks import pair_blocks
from .exchange import Peers
from .gathered import Gathering, gathered_attention, grid_shape, wanted_spans
from .heads import local_attention, ulysses_attention, whole_blocks
from .ring import Ring, ring_attention
from .sharding import Sharding


LAYOUTS = ("ring", "query", "key", "head", "ulysses", "grid")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def distributed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: str = "ring",
    group: distributed.ProcessGroup | None = None,
    causal: bool = False,
    split: str = "contiguous",
    grid: tuple[int, int] | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    scaling: float | None = None,
    return_logsumexp: bool = False,
    timeout: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local queries to the keys of all ranks, equal to attention in a single process.

    All ranks of the group must make the same call. Differentiable; each rank gets the gradients of its own tensors.

    Args:
        query: `(batch, heads, tokens, head_dim)`, the tokens of this rank. In the layout `"head"` the heads of this rank, with all
            tokens.
        key: `(batch, kv_heads, tokens, head_dim)`; `heads` must be a multiple of `kv_heads`.
        value: `(batch, kv_heads, tokens, value_dim)`.
        layout: distribution of the work. `"ring"`: keys and values are passed around. `"query"`: they are gathered. `"key"`: queries are gathered and
            partial results merged. `"grid"`: both, in blocks. `"ulysses"`: tokens are exchanged for heads. `"head"`: the
            tensors hold some heads of all tokens; nothing is communicated.
        group: of processes; all by default.
        causal: a token attends to itself and earlier tokens, by their positions in the whole sequence.
        split: how the sequence is split: `"contiguous"`, parts of any length; `"zigzag"`, see
            [`~hf_attn.distributed.sharding.split_spans`], with equal work for all ranks if causal.
        grid: query blocks and key blocks of the layout `"grid"`.
        attention_mask: `(batch, length)` of the whole sequence, False or 0 for padding; the same in all ranks.
        cu_seqlens: bounds of the documents of a packed sequence, from 0 to its length; tokens attend only to their own document.
        scaling: of the logits; `head_dim ** -0.5` by default.
        return_logsumexp: also return the log-sum-exp of the logits.
        timeout: seconds to wait for other ranks; by default the process group's.

    Returns:
        Output `(batch, heads, tokens, value_dim)` in the dtype of the query. Padding gets zeros. With `return_logsumexp` also
        `(batch, heads, tokens)`, without gradients.

    Raises:
        RuntimeError: if there is no process group; `LostRankError` if another rank does not answer in time.
        ValueError: on all ranks, if shapes, dtypes or arguments do not fit or differ between ranks.
    """
    peers = Peers(group, timeout)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    problem = _problem(query, key, value)
    facts = {
        # If one rank raised alone, the others would keep waiting.
        "whether the shapes fit": int(not problem),
        "layout": LAYOUTS.index(layout),
        "split": zlib.crc32(split.encode()),
        "causal": int(causal),
        "batch size": query.shape[0] if query.dim() else 0,
        "head width": query.shape[-1] if query.dim() else 0,
        "width of values": value.shape[-1] if value.dim() else 0,
        "dtype": _DTYPES.index(query.dtype) if query.dtype in _DTYPES else -1,
        "attention mask": _checksum(attention_mask),
        "cu_seqlens": _checksum(cu_seqlens),
        "grid": 0 if grid is None else grid[0] * 100003 + grid[1],
    }
    if layout != "head" and query.dim() == key.dim() == 4:
        facts |= {"heads": query.shape[1], "key/value heads": key.shape[1]}
    tokens = query.shape[2] if query.dim() == 4 else -1
    if peers.size > 1:
        gathered = peers.all_gather_integers([tokens, *facts.values()])
        _raise_differences(list(facts), gathered, problem)
        lengths = [values[0] for values in gathered]
    else:
        lengths = [tokens]
    if problem:
        raise ValueError(problem)
    if attention_mask is not None and attention_mask.dim() == 2 and len(attention_mask) != len(query):
        raise ValueError(f"The attention mask has {len(attention_mask)} rows, but the batch has {len(query)}.")

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout == "head":
        sharding = Sharding.make(tokens, 1, "contiguous", cu_seqlens, attention_mask)
        output, logsumexp = local_attention(query, key, value, whole_blocks(sharding, causal), scaling)
    else:
        sharding = _sharding(lengths, split, cu_seqlens, attention_mask)
        schedule = Schedule(peers, sharding, layout, split, grid)
        output, logsumexp = schedule.attend(query, key, value, causal, scaling)
    return (output, logsumexp) if return_logsumexp else output


class Schedule:
    """Distribution of the work for a batch in a layout that splits tokens; computed once and used by all layers.

    Args:
        peers: the ranks.
        sharding: of the sequence.
        layout: one of [`LAYOUTS`] but `"head"`.
        split: of the blocks of a grid.
        grid: query blocks and key blocks.
    """

    def __init__(
        self,
        peers: Peers,
        sharding: Sharding,
        layout: str,
        split: str = "contiguous",
        grid: tuple[int, int] | None = None,
    ):
        self.peers, self.sharding, self.layout = peers, sharding, layout
        if layout == "ring":
            self.rings = [whole_ring(sharding)]
        elif layout != "ulysses":
            grid = grid_shape(peers.size, grid) if layout == "grid" else None
            self.gathering = Gathering(sharding, layout, split, grid, peers.rank)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp as in [`distributed_attention`], without its checks."""
        if self.layout == "ring":
            return ring_attention(query, key, value, self.peers, self.rings, causal, scaling)
        if self.layout == "ulysses":
            return ulysses_attention(query, key, value, self.peers, self.sharding, causal, scaling)
        return gathered_attention(query, key, value, self.peers, self.gathering, causal, scaling)


def whole_ring(sharding: Sharding) -> Ring:
    """A ring of all ranks."""
    return Ring(
        ranks=tuple(range(sharding.ranks)),
        bounds=tuple((0, length) for length in sharding.lengths),
        rows=tuple(sharding.rows(spans) for spans in sharding.spans),
    )


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sharding: Sharding,
    query_spans: Sequence[tuple[int, int]],
    key_spans: Sequence[tuple[int, int]],
    causal: bool = False,
    scaling: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The partial result of one rank: attention of some queries to some keys, and its log-sum-exp.

    Args:
        query: `(batch, heads, queries, head_dim)`, the tokens of `query_spans`.
        key: `(batch, kv_heads, keys, head_dim)`, those of `key_spans`.
        value: `(batch, kv_heads, keys, value_dim)`.
        sharding: of the sequence, for documents and padding.
        query_spans: of the whole sequence.
        key_spans: of the whole sequence.
        causal: a token attends to itself and earlier tokens.
        scaling: of the logits; `head_dim ** -0.5` by default.
    """
    pairs = zip(sharding.rows(query_spans), sharding.rows(key_spans), strict=True)
    blocks = [(q.span, pair_blocks(q.runs, k.runs, causal)) for q, k in pairs]
    return local_attention(query, key, value, blocks, query.shape[-1] ** -0.5 if scaling is None else scaling)


def layout_spans(
    layout: str, length: int, ranks: int, split: str = "contiguous", grid: tuple[int, int] | None = None
) -> list[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]]:
    """Queries and keys on which each rank of a layout computes, as spans of the sequence.

    For the layouts `"head"` and `"ulysses"` that is everything, of [`~hf_attn.distributed.heads.head_spans`].
    """
    if layout == "grid":
        rows, columns = grid if grid is not None else grid_shape(ranks, None)
        return wanted_spans("grid", Sharding.make(length, rows * columns, split), split, (rows, columns))
    sharding = Sharding.make(length, ranks, split)
    if layout in ("head", "ulysses"):
        return [(((0, length),), ((0, length),))] * ranks
    return wanted_spans("key" if layout == "key" else "query", sharding, split)


def _problem(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"Query, key and value must have the shape (batch, heads, tokens, width), got {shapes}."
    if not query.dtype == key.dtype == value.dtype:
        return f"Query, key and value must have the same dtype, got {query.dtype}, {key.dtype} and {value.dtype}."
    if query.dtype not in _DTYPES:
        return f"Attention needs floating-point tensors, got {query.dtype}."
    same = query.shape[0] == key.shape[0] == value.shape[0] and query.shape[2] == key.shape[2] == value.shape[2]
    if not same or key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
        return f"Query, key and value must have the same batch size and number of tokens, got {shapes}."
    if key.shape[1] == 0 and query.shape[1] == 0:
        return ""
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} heads are not a multiple of {key.shape[1]} key/value heads."
    return ""


def _raise_differences(names: list[str], gathered: list[list[int]], problem: str) -> None:
    if problem:
        raise ValueError(problem)
    for i, name in enumerate(names, start=1):
        values = [rank[i] for rank in gathered]
        if name == "whether the shapes fit" and not all(values):
            raise ValueError(f"The tensors of rank {values.index(0)} do not match; see the error of that rank.")
        if len(set(values)) > 1:
            if name == "dtype":
                values = [str(_DTYPES[value]) for value in values]
            listed = ", ".join(f"{value} in rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"All ranks must make the same call, but they differ in {name}: {listed}.")


def _checksum(values: torch.Tensor | Sequence[int] | None) -> int:
    if values is None:
        return 0
    values = torch.as_tensor(values)
    facts = repr((tuple(values.shape), values.long().flatten().tolist()))
    return 1 + zlib.crc32(facts.encode())


def _sharding(lengths: list[int], split: str, cu_seqlens, mask) -> Sharding:
    if split == "contiguous":
        return Sharding.from_lengths(lengths, cu_seqlens, mask)
    sharding = Sharding.make(sum(lengths), len(lengths), split, cu_seqlens, mask)
    if sharding.lengths != tuple(lengths):
        raise ValueError(
            f"A sequence of {sum(lengths)} tokens is split {split} as {list(sharding.lengths)} over {len(lengths)} "
            f"ranks, but the ranks have {lengths}. Split it with `shard`."
        )
    return sharding
