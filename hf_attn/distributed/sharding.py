"""Assignment of tokens to ranks: splits of a sequence, sharding and gathering of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from .blocks import Rows, Span, runs_of, visible_spans
from .exchange import Peers
from .pieces import pieces


SPLITS = ("contiguous", "zigzag")


def split_spans(length: int, ranks: int, split: str) -> tuple[tuple[Span, ...], ...]:
    """The tokens of each rank as spans of the sequence.

    `"contiguous"`: one part per rank. `"zigzag"`: two parts per rank, where rank `r` has parts `r` and `2 * ranks - 1 - r`, so
    that all ranks have the same work in causal attention.

    Raises:
        ValueError: for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    count = ranks if split == "contiguous" else 2 * ranks
    sizes = pieces(length, count)
    parts = [(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    if split == "contiguous":
        return tuple((part,) for part in parts)
    return tuple((parts[rank], parts[2 * ranks - 1 - rank]) for rank in range(ranks))


@dataclass(frozen=True)
class Sharding:
    """The lengths and masks of a batch, and the rank of each of its tokens.

    Attributes:
        spans: parts of the sequence for each rank, in the order in which the rank stores them.
        length: of the whole sequence.
        cu_seqlens: first token of each document of a packed sequence, and the length; `(0, length)` for one document.
        mask: boolean `(batch, length)`, False for padding, or None.
    """

    spans: tuple[tuple[Span, ...], ...]
    length: int
    cu_seqlens: tuple[int, ...]
    mask: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        length: int,
        ranks: int,
        split: str = "contiguous",
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> "Sharding":
        """Split a sequence by a rule.

        Raises:
            ValueError: for an unknown split, `cu_seqlens` that do not lead from 0 to the length, or a mask of another shape.
        """
        return cls(split_spans(length, ranks, split), length, *_checked(length, cu_seqlens, mask))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], cu_seqlens=None, mask=None) -> "Sharding":
        """One contiguous part of the given length per rank."""
        ends = list(accumulate(lengths))
        spans = tuple(((end - size, end),) for end, size in zip(ends, lengths, strict=True))
        return cls(spans, ends[-1], *_checked(ends[-1], cu_seqlens, mask))

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    def indices(self, rank: int) -> torch.Tensor:
        """Index in the whole sequence of each token of a rank."""
        return span_indices(self.spans[rank])

    @cached_property
    def row_groups(self) -> list[tuple[Span, list[tuple[int, int, int]]]]:
        """Groups of consecutive rows with the same padding, and the tokens that are visible in them."""
        if self.mask is None:
            return [((0, None), visible_spans(self.cu_seqlens, None))]
        groups: list[tuple[Span, list]] = []
        for row, mask in enumerate(self.mask.cpu()):
            visible = visible_spans(self.cu_seqlens, mask)
            if groups and groups[-1][1] == visible:
                groups[-1] = ((groups[-1][0][0], row + 1), visible)
            else:
                groups.append(((row, row + 1), visible))
        return groups

    def rows(self, spans: Sequence[Span]) -> list[Rows]:
        """Runs of a tensor that holds `spans`, for each group of rows."""
        return [Rows(span, runs_of(spans, visible)) for span, visible in self.row_groups]

    @property
    def position_ids(self) -> torch.Tensor:
        """`(1, length)`: positions in the document, as transformers models compute them."""
        index = torch.arange(self.length)
        starts = torch.tensor(self.cu_seqlens[:-1])
        return (index - starts[torch.searchsorted(starts, index, right=True) - 1])[None]


def span_indices(spans: Sequence[Span]) -> torch.Tensor:
    """Index in the whole sequence of each token of some spans."""
    return torch.cat([torch.arange(start, stop) for start, stop in spans] or [torch.arange(0)])


def _checked(length, cu_seqlens, mask) -> tuple[tuple[int, ...], torch.Tensor | None]:
    if cu_seqlens is None:
        cu_seqlens = (0, length)
    bounds = tuple(int(bound) for bound in cu_seqlens)
    if bounds[:1] != (0,) or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the length of the sequence, {length}, got {list(bounds)}.")
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != length:
            raise ValueError(
                f"The attention mask must have the shape (batch, {length}), for the whole sequence and the same on "
                f"all ranks; got {tuple(mask.shape)}."
            )
        mask = mask.bool()
    return bounds, mask


def shard_tensor(tensor: torch.Tensor, sharding: Sharding, rank: int, dim: int = 1) -> torch.Tensor:
    """The part of a tensor with all tokens that belongs to a rank.

    Raises:
        ValueError: if the tensor has another length in this dimension.
    """
    if tensor.shape[dim] != sharding.length:
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} has {tensor.shape[dim]} tokens in dimension {dim}, but the "
            f"sequence has {sharding.length}."
        )
    spans = sharding.spans[rank] or ((0, 0),)
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in spans], dim)


def unshard_tensor(tensor: torch.Tensor, sharding: Sharding, peers: Peers, dim: int = 1) -> torch.Tensor:
    """Gather a tensor in token order on every rank, from the tokens of each rank; without gradients.

    Raises:
        ValueError: if the tensor does not have the tokens of this rank.
    """
    if tensor.shape[dim] != sharding.lengths[peers.rank]:
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} has {tensor.shape[dim]} tokens in dimension {dim}, but rank "
            f"{peers.rank} has {sharding.lengths[peers.rank]}."
        )
    shapes = [(*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]) for length in sharding.lengths]
    parts = peers.exchange([tensor] * peers.size, shapes)
    places = torch.cat([sharding.indices(rank) for rank in range(peers.size)]).to(tensor.device)
    return torch.cat(parts, dim).index_select(dim, places.argsort())


def shift_labels(labels: torch.Tensor, sharding: Sharding, ignore_index: int = -100) -> torch.Tensor:
    """Shift labels before sharding: the label of each token is the next token of its document.

    Args:
        labels: `(batch, length)`, as for a causal model of transformers.
        sharding: of the sequence.
        ignore_index: label that is ignored.
    """
    shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].clone()
    lasts = [bound - 1 for bound in sharding.cu_seqlens[1:] if bound > 0]
    shifted[..., lasts] = ignore_index
    return shifted
