"""Decoding with Combiner attention: the state of earlier tokens, and the processing of new ones.

The spans that a causal query attends to are complete, so their summaries are computed once. `fixed` and `rowmajor` keep the summaries
of closed segments and the tokens of the open one, and process the tokens of a segment together. The other plans, which
attend directly to tokens of earlier segments or summarise them again, also keep all tokens. They recompute the whole
sequence for at least a segment's length of new tokens, and process fewer tokens one at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .call import CombinerCall, Sequences, allowed_pairs, left_padded
from .plan import ROWMAJOR
from .softmax import masked_softmax


#: plans whose queries see, beside their own segment, summaries of earlier ones that never change
SEGMENT_KINDS = ("fixed", ROWMAJOR)


@dataclass(frozen=True)
class Closing:
    """Spans that are summarised together.

    Attributes:
        slots: where their summaries go.
        first, last: their tokens are among the positions from `first` to before `last`.
        members: boolean `(spans, last - first)`.
        asking: position, after `first`, of the query that reads each span; `None` if their queries are pooled.
    """

    slots: slice
    first: int
    last: int
    members: torch.Tensor
    asking: torch.Tensor | None = None


def closings(kind: str, segment_length: int, seen: int, position: int) -> Iterator[Closing]:
    """The spans to summarise for a query, beyond those that queries before have needed.

    Args:
        kind: plan.
        segment_length: tokens of a segment.
        seen: number of positions whose queries have been served (all of them before `position`).
        position: of the query.
    """
    if kind == "logsparse":
        for level in range(position.bit_length()):
            begin = (position >> (level + 1)) << (level + 1)
            if (position >> level) & 1 and begin + (1 << level) >= max(seen, 1):
                size = 1 << level
                yield Closing(slice(level, level + 1), begin, begin + size, torch.ones(1, size, dtype=torch.bool))
        return
    s = segment_length
    row = position // s
    served = max(seen - 1, 0) // s
    if row == served:
        return
    column = torch.arange(s)
    if kind in ("vertical", "mixture"):
        yield Closing(slice(0, s), 0, row * s, torch.arange(row * s) % s == column[:, None])
    for a in range(served, row):
        first, last = a * s, (a + 1) * s
        if kind == "fixed":
            yield Closing(slice(a, a + 1), first, last, torch.ones(1, s, dtype=torch.bool))
        elif kind == ROWMAJOR:
            yield Closing(slice(first, last), first, last, torch.ones(s, s, dtype=torch.bool), column)
        elif kind == "horizontal":
            yield Closing(slice(first, last), first, last, column != column[:, None])
        elif kind == "mixture":
            yield Closing(slice(s + 2 * first, s + first + last), first, last, column < column[:, None])
            yield Closing(slice(s + first + last, s + 2 * last), first, last, column > column[:, None])


def sees(kind: str, segment_length: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that a query attends to directly, and the slots of its spans; not for `SEGMENT_KINDS`."""
    if kind == "logsparse":
        slots = [level for level in range(position.bit_length()) if (position >> level) & 1]
        return torch.tensor([position]), torch.tensor(slots, dtype=torch.long)
    s = segment_length
    row, column = divmod(position, s)
    cells = torch.arange(row) * s + column
    direct = torch.cat((cells, torch.arange(row * s, position + 1)))
    others = torch.cat((torch.arange(column), torch.arange(column + 1, s))) if row > 0 else torch.arange(0)
    if kind == "vertical":
        return direct, others
    if kind == "horizontal":
        return direct, cells if s > 1 else cells[:0]
    left = s + 2 * (cells - column) + column
    slots = [others, *([left] if column > 0 else []), *([left + s] if column < s - 1 else [])]
    return direct, torch.cat(slots)


class CombinerState:
    """State of a layer for earlier tokens.

    Attributes:
        seen_tokens: number of columns of the input so far, padding included.
        end: why no token can follow; empty if one can.
        start: `(batch,)`, the number of padding columns before the first token of each row.
        first: the first column that `query`, `key`, `value` and `row_input` hold.
        query, key, value: of the tokens that are still needed, `(batch, heads, columns, head_dim)`.
        row_input: for `rowmajor`, inputs of the attention module `(batch, columns, width)`.
        span_key, span_value: summaries, `(batch, heads, slots, head_dim)`.
    """

    #: its tensors, all with the batch first
    names = ("start", "query", "key", "value", "row_input", "span_key", "span_value")

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.seen_tokens = self.first = 0
        self.end = ""
        for name in self.names:
            setattr(self, name, None)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all tensors."""
        for name in self.names:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def attend(self, call: CombinerCall, sequences: Sequences | None, attend: Callable):
        """Serve the tokens of a call after those that the state knows.

        Args:
            call: of the new tokens only, with the mask over all columns or none.
            sequences: of the first call.
            attend: `(call, sequences) -> (output, weights | None)`, for the first call.

        Raises:
            ValueError: for sequences that cannot be continued.
        """
        new = call.query.shape[2]
        if self.seen_tokens == 0:
            output, weights = attend(call, sequences)
            self._begin(call, sequences)
        elif self.end:
            raise ValueError(f"This cache cannot be continued: {self.end}, or pass use_cache=False.")
        else:
            self._find_start(call, new)
            output, weights = self._continue(call, attend), None
        return output, weights

    def _continue(self, call: CombinerCall, attend: Callable) -> torch.Tensor:
        """Output `(batch, heads, new, head_dim)` of tokens that follow."""
        new = call.query.shape[2]
        if call.kind in SEGMENT_KINDS:
            self._append(call, 0, new)
            output = self._segments(call, new)
            self._forget(call)
            return output
        if new > 1 and new >= call.segment_length:
            self._append(call, 0, new)
            return self._whole(call, new, attend)
        outputs = []
        for i in range(new):
            self._append(call, i, i + 1)
            outputs.append(self._step(call))
        return torch.cat(outputs, dim=2)

    def _begin(self, call: CombinerCall, sequences: Sequences) -> None:
        batch, length = call.query.shape[0], call.query.shape[2]
        self.seen_tokens = length
        self.start = sequences.start
        if self.start is None:
            self.start = torch.zeros(batch, dtype=torch.long, device=call.query.device)
        elif sequences.index.shape[0] > batch:
            self.end = "it contains several sequences in one row. Use one row per sequence"
        elif bool((sequences.valid.sum(1) != (length - self.start)[self.start < length]).any()):
            self.end = "its batch is padded on the right. Set tokenizer.padding_side='left'"
        if not sequences.is_causal:
            self.end = "its attention is not causal"
        if self.end:
            return
        key, value = call.repeated_heads()
        self.query, self.key, self.value, self.row_input = call.query, key, value, call.row_input
        self.span_key, self.span_value = key[:, :, :0], value[:, :, :0]
        self._close_all(call, served=0)
        self._forget(call)

    def _find_start(self, call: CombinerCall, new: int) -> None:
        columns = self.seen_tokens + new
        if call.attention_mask is None:
            return
        allowed = allowed_pairs(call.attention_mask)
        if isinstance(allowed, torch.Tensor) and allowed.shape[-1] >= columns:
            last = allowed[:, -1, :columns].expand(len(self.start), -1)
            start = torch.where(last[:, -1], last.int().argmax(1), columns)
            held = torch.where(self.start < self.seen_tokens, start == self.start, start >= self.start)
            if bool(held.all()) and bool((last.sum(1) == columns - start).all()):
                self.start = start
                return
        raise ValueError(
            "The mask does not continue the sequences in the cache: it has gaps, or begins at another token. Pad on "
            "the left, and pass the mask of all tokens."
        )

    def _append(self, call: CombinerCall, first: int, last: int) -> None:
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (states[:, :, first:last].repeat_interleave(groups, dim=1) for states in (call.key, call.value))
        self.query = torch.cat((self.query, call.query[:, :, first:last]), dim=2)
        self.key, self.value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        if call.row_input is not None:
            self.row_input = torch.cat((self.row_input, call.row_input[:, first:last]), dim=1)
        self.seen_tokens += last - first

    def _forget(self, call: CombinerCall) -> None:
        """Drop the tokens that no later query needs: for two of the plans, all before the last segment's length."""
        drop = self.seen_tokens - self.first - call.segment_length
        if call.kind in SEGMENT_KINDS and drop > 0:
            self.query, self.key, self.value = (
                states[:, :, drop:].clone() for states in (self.query, self.key, self.value)
            )
            self.row_input = None if self.row_input is None else self.row_input[:, drop:].clone()
            self.first += drop

    def _groups(self) -> list[tuple[torch.Tensor, int]]:
        """Rows of the batch whose sequences began in the same column, and that column."""
        return [(torch.nonzero(self.start == start)[:, 0], start) for start in sorted(set(self.start.tolist()))]

    def _segments(self, call: CombinerCall, new: int) -> torch.Tensor:
        """Output of the last `new` tokens for `SEGMENT_KINDS`, those of a segment at a time."""
        outputs = torch.zeros_like(self.value[:, :, -new:])
        groups = self._groups()
        s, shift = call.segment_length, self.value.shape[2] - new
        for rows, start in groups:
            of = _rows_of(rows, len(groups))
            offset = start - self.first  # of the columns that are held, from positions
            position, end = max(self.seen_tokens - new - start, 0), self.seen_tokens - start
            while position < end:
                row = position // s
                stop = min((row + 1) * s, end)
                self._close(call, rows, start, seen=position, position=position)
                key, value = (of(states)[:, :, row * s + offset : stop + offset] for states in (self.key, self.value))
                query = of(self.query)[:, :, position + offset : stop + offset]
                columns = torch.arange(position - row * s, stop - row * s, device=key.device)
                later = torch.arange(key.shape[2], device=key.device) > columns[:, None]
                direct = (query @ key.transpose(-1, -2)).masked_fill(later, float("-inf"))
                if call.kind == "fixed":
                    span_key, span_value = (of(spans)[:, :, :row] for spans in (self.span_key, self.span_value))
                    across = query @ span_key.transpose(-1, -2)
                else:
                    # Of each earlier row the span of the query's own column: (batch, heads, queries, rows, head_dim).
                    span_key, span_value = (
                        of(spans)[:, :, : row * s].unflatten(2, (row, s))[:, :, :, columns].transpose(2, 3)
                        for spans in (self.span_key, self.span_value)
                    )
                    across = (span_key @ query[..., None])[..., 0]
                logits = torch.cat((across, direct), dim=-1) * call.scaling
                precision = torch.promote_types(logits.dtype, torch.float32)
                weights = logits.softmax(dim=-1, dtype=precision).to(value.dtype)
                across, direct = weights.split((row, key.shape[2]), dim=-1)
                if call.kind == "fixed":
                    output = across @ span_value
                else:
                    output = (across[..., None, :] @ span_value)[..., 0, :]
                outputs[rows, :, position + offset - shift : stop + offset - shift] = output + direct @ value
                position = stop
        return outputs

    def _whole(self, call: CombinerCall, new: int, attend: Callable) -> torch.Tensor:
        """Output of the last `new` tokens from the form for whole sequences; all tokens are held."""
        whole = replace(
            call, query=self.query, key=self.key, value=self.value, attention_mask=None, is_causal=True, state=None
        )
        output, _ = attend(whole, left_padded(self.start, self.seen_tokens))
        self._close_all(call, served=self.seen_tokens - new)
        return output[:, :, -new:]

    def _close_all(self, call: CombinerCall, served: int) -> None:
        """Close what the last query needs and those of the columns before `served` have not closed."""
        for rows, start in self._groups():
            if self.seen_tokens > start:
                self._close(call, rows, start, seen=max(served - start, 0), position=self.seen_tokens - 1 - start)

    def _step(self, call: CombinerCall) -> torch.Tensor:
        """Output `(batch, heads, 1, head_dim)` of the last token."""
        outputs = torch.zeros_like(self.value[:, :, -1:])
        groups = self._groups()
        for rows, start in groups:
            position = self.seen_tokens - 1 - start
            if position < 0:
                continue
            self._close(call, rows, start, seen=position, position=position)
            direct, slots = sees(call.kind, call.segment_length, position)
            direct, slots = (index.to(self.key.device) for index in (direct + start - self.first, slots))
            of = _rows_of(rows, len(groups))
            keys, values = (
                torch.cat((of(tokens).index_select(2, direct), of(spans).index_select(2, slots)), dim=2)
                for tokens, spans in ((self.key, self.span_key), (self.value, self.span_value))
            )
            logits = of(self.query[:, :, -1:]) @ keys.transpose(-1, -2) * call.scaling
            weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(values.dtype)
            outputs = outputs.index_copy(0, rows, weights @ values)
        return outputs

    def _close(self, call: CombinerCall, rows: torch.Tensor, start: int, seen: int, position: int) -> None:
        for closing in closings(call.kind, call.segment_length, seen, position):
            columns = slice(start + closing.first - self.first, start + closing.last - self.first)
            query, key, value = (states[rows, :, columns] for states in (self.query, self.key, self.value))
            members = closing.members.to(key.device)
            if closing.asking is None:
                span_query, span_key = (_pool(states, members, call.pool) for states in (query, key))
            else:
                span_query = query[:, :, closing.asking.to(key.device)]
            logits = span_query @ key.transpose(-1, -2) * call.scaling
            span_value = masked_softmax(logits, members).to(value.dtype) @ value
            if closing.asking is not None:
                span_key = call.row_key(span_value, self.row_input[rows, columns])
            self._put(rows, closing.slots, span_key, span_value)

    def _put(self, rows: torch.Tensor, slots: slice, span_key: torch.Tensor, span_value: torch.Tensor) -> None:
        more = slots.stop - self.span_key.shape[2]
        if more > 0:
            self.span_key, self.span_value = (
                torch.nn.functional.pad(states, (0, 0, 0, more)) for states in (self.span_key, self.span_value)
            )
        self.span_key[rows, :, slots] = span_key
        self.span_value[rows, :, slots] = span_value


def _rows_of(rows: torch.Tensor, groups: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What picks the rows of a group; without a copy if it is the only one."""
    return (lambda states: states) if groups == 1 else (lambda states: states[rows])


def _pool(states: torch.Tensor, members: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool tokens `(batch, heads, tokens, head_dim)` by spans `(spans, tokens)`; 0 for an empty span."""
    if pool == "max":
        few = [
            states[:, :, some].amax(2) if bool(some.any()) else torch.zeros_like(states[:, :, 0]) for some in members
        ]
        return torch.stack(few, dim=2)
    total = members.to(states.dtype) @ states
    return total if pool == "sum" else total / members.sum(1)[:, None].clamp(min=1)
