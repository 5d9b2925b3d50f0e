"""One call of Combiner attention, and the sequences that its mask describes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..call import AttentionCall, Refusal, refusal_of_fused
from .plan import BIDIRECTIONAL_KINDS, OWN_SUMMARY_KINDS


POOLS = ("max", "mean", "sum")


@dataclass(eq=False)
class CombinerCall(AttentionCall):
    """Arguments of Combiner attention.

    Attributes:
        kind: the plan, see [`hf_attn.kernels.combiner.plan`].
        segment_length: tokens of a segment; near the square root of the number of keys if not given.
        pool: how the queries and the keys of a span become one, `"max"`, `"mean"` or `"sum"`.
        own_segment_summary: whether, without causality, a token also attends to the summary of its own segment.
        row_key: of `rowmajor`: `(row outputs (batch, heads, tokens, head_dim), row inputs (batch, tokens, width)) -> keys
            (batch, heads, tokens, head_dim)`.
        row_input: of `rowmajor`: input of the attention module, `(batch, length, width)`.
        state: what is kept of earlier tokens, a [`~hf_attn.kernels.combiner.decoding.CombinerState`].
    """

    kind: str = "fixed"
    segment_length: int | None = None
    pool: str = "max"
    own_segment_summary: bool = False
    row_key: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    row_input: torch.Tensor | None = None
    state: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.segment_length is None:
            self.segment_length = default_segment_length(self.key.shape[2])
        if self.segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {self.segment_length}.")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, got {self.pool!r}.")

    def repeated_heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value with as many heads as the query; not copied if they have as many already."""
        if self.key.shape[1] == self.query.shape[1]:
            return self.key, self.value
        return super().repeated_heads()


def default_segment_length(length: int) -> int:
    """The segment length near the square root of a length."""
    return max(1, round(length**0.5))


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a call, each in a row of its own that begins with its first token.

    Attributes:
        is_causal: whether a token attends only to itself and earlier tokens.
        index: `(sequences, longest)`, where their tokens are in the flattened batch; `None` if the rows of the batch
            are the sequences.
        valid: boolean `(sequences, longest)`, false where a sequence is over; `None` if they are all as long.
        start: `(batch,)`, the first token of each row; `None` for 0.
    """

    is_causal: bool
    index: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    start: torch.Tensor | None = None

    def gather(self, states: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """States with the tokens in dimension `dim` by sequences; zeros where a sequence is over."""
        if self.index is None:
            return states
        moved = states.movedim(dim, 1).flatten(0, 1)
        picked = moved[self.index.flatten()].unflatten(0, self.index.shape)
        blank = (~self.valid).reshape(*self.valid.shape, *(1,) * (picked.dim() - 2))
        return picked.masked_fill(blank, 0).movedim(1, dim)

    def scatter(self, states: torch.Tensor, batch: int, length: int, dim: int = 2) -> torch.Tensor:
        """The inverse of [`gather`]; zeros for padding."""
        if self.index is None:
            return states
        moved = states.movedim(dim, 1)
        flat = moved.new_zeros(batch * length, *moved.shape[2:])
        flat = flat.index_put((self.index[self.valid],), moved[self.valid])
        return flat.unflatten(0, (batch, length)).movedim(1, dim)


HOLES = (
    "spans need sequences without gaps, but the mask has gaps or does not cover whole sequences; use left or right "
    "padding, or packed sequences"
)


def allowed_pairs(mask: torch.Tensor) -> torch.Tensor | Refusal:
    """A mask, boolean or additive, as boolean `(batch, q_len, kv_len)`."""
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask.masked_fill(~allowed, 0) != 0).any()):
            return Refusal("it does not support additive masks")
    else:
        allowed = mask
    if allowed.shape[1] != 1:
        if bool((allowed != allowed[:, :1]).any()):
            return Refusal("it does not support masks that differ between heads")
        allowed = allowed[:, :1]
    return allowed[:, 0]


def find_sequences(call: CombinerCall) -> Sequences | Refusal:
    """The sequences of a call that attends to its own tokens, or why it is not supported."""
    batch, q_len, length = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    if call.sliding_window is not None:
        return Refusal("it does not support sliding windows, because spans are summarised as a whole")
    if q_len != length:
        return Refusal(
            f"it needs the queries of all {length} tokens to summarise spans, but got {q_len}; decode with "
            "past_key_values=hf_attn.CombinerCache(), or with use_cache=False"
        )
    found = Sequences(call.is_causal)
    if call.attention_mask is not None:
        if torch.compiler.is_exporting():
            return Refusal(
                "a graph for torch.export or ONNX cannot read off the values of the mask where sequences begin; run the model in "
                "PyTorch"
            )
        found = _from_mask(call, batch, length)
    if isinstance(found, Refusal) or found.is_causal:
        return found
    if call.kind not in BIDIRECTIONAL_KINDS:
        return Refusal(f"{call.kind} is defined for causal attention only")
    if call.own_segment_summary and call.kind not in OWN_SUMMARY_KINDS:
        return Refusal(f"own_segment_summary is for {', '.join(OWN_SUMMARY_KINDS)}, not for {call.kind}")
    return found


def _from_mask(call: CombinerCall, batch: int, length: int) -> Sequences | Refusal:
    allowed = allowed_pairs(call.attention_mask)
    if isinstance(allowed, Refusal):
        return allowed
    position = torch.arange(length, device=allowed.device)
    if call.is_causal:
        allowed = allowed & (position <= position[:, None])
    allowed = allowed.expand(batch, length, length)
    valid = allowed.diagonal(dim1=1, dim2=2)
    first = torch.where(valid, allowed.int().argmax(dim=2), -1)
    last = length - 1 - allowed.flip(2).int().argmax(dim=2)
    is_causal = call.is_causal or not bool((valid & (last > position)).any())
    expected = (first[:, :, None] == first[:, None]) & valid[:, None]
    if is_causal:
        expected = expected & (position <= position[:, None])
    whole = allowed.sum(2) == last - first + 1
    if bool((valid & ~(whole & (allowed == expected).all(2))).any()):
        return Refusal(HOLES)
    if bool(valid.all()) and bool((first == 0).all()):
        return Sequences(is_causal)
    return _packed(first, valid, is_causal)


def left_padded(start: torch.Tensor, length: int) -> Sequences:
    """Causal sequences to the end of rows.

    Args:
        start: `(batch,)`, the columns of padding before each; `length` for a row without a token.
        length: number of columns.
    """
    if not bool(start.any()):
        return Sequences(is_causal=True)
    valid = torch.arange(length, device=start.device) >= start[:, None]
    return _packed(torch.where(valid, start[:, None], -1), valid, is_causal=True)


def _packed(first: torch.Tensor, valid: torch.Tensor, is_causal: bool) -> Sequences:
    length = first.shape[1]
    row, place = torch.nonzero(valid & (torch.arange(length, device=first.device) == first), as_tuple=True)
    of_row, of_place = torch.nonzero(valid, as_tuple=True)
    key = of_row * length + first[of_row, of_place]
    sequence = torch.searchsorted(row * length + place, key)
    offset = of_place - first[of_row, of_place]
    longest = int(offset.max()) + 1 if len(offset) else 1
    index = torch.zeros(max(len(row), 1), longest, dtype=torch.long, device=first.device)
    filled = torch.zeros_like(index, dtype=torch.bool)
    index[sequence, offset] = of_row * length + of_place
    filled[sequence, offset] = True
    return Sequences(is_causal, index, filled, _start_of_rows(valid))


def _start_of_rows(valid: torch.Tensor) -> torch.Tensor:
    """The number of padding tokens before the first one of each row."""
    return torch.where(valid.any(1), valid.int().argmax(1), valid.shape[1])


def by_sequences(call: CombinerCall, sequences: Sequences) -> CombinerCall:
    """The call with a sequence in each row, and as many heads of keys as of queries."""
    key, value = call.repeated_heads()
    query, key, value = (sequences.gather(states) for states in (call.query, key, value))
    row_input = None if call.row_input is None else sequences.gather(call.row_input, dim=1)
    return replace(
        call,
        query=query,
        key=key,
        value=value,
        row_input=row_input,
        attention_mask=None,
        is_causal=sequences.is_causal,
    )


def check_eager(call: CombinerCall) -> Sequences | Refusal | None:
    """Whether the reference supports a call; its sequences."""
    if call.state is not None and call.state.seen_tokens > 0:
        return None
    return find_sequences(call)


def check_torch(call: CombinerCall) -> Sequences | Refusal | None:
    """Whether the fast implementation supports a call; its sequences."""
    refusal = refusal_of_fused(call)
    if refusal is not None:
        return refusal
    if call.pool != "max" and call.kind != "fixed":
        return Refusal(f"it pools spans of {call.kind} by their maximum and does not support pool={call.pool!r}")
    sequences = check_eager(call)
    is_ragged = isinstance(sequences, Sequences) and not sequences.is_causal and sequences.valid is not None
    if is_ragged and call.kind != "fixed":
        return Refusal(f"it does not support padding or several sequences per row in non-causal {call.kind}")
    return sequences
