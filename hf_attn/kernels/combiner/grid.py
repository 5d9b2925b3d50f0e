"""The plans of rows and columns: dense products over a grid of segments, `length * (segments + segment_length)` scores."""

import torch
from torch.nn import functional as F

from .call import CombinerCall
from .plan import ROWMAJOR
from .softmax import masked_softmax


def _exclusive(states: torch.Tensor, dim: int, reverse: bool) -> torch.Tensor:
    """The maximum of all entries before (`reverse`: after) each one, the dtype's minimum if there is none.

    Of equal values the one with the lowest index gets the gradient.
    """
    lowest = torch.finfo(states.dtype).min
    if reverse:
        states = states.flip(dim)
    size = states.shape[dim]
    values = states.detach()
    before = torch.full_like(values.narrow(dim, 0, 1), -torch.inf)
    before = torch.cat((before, values.cummax(dim).values.narrow(dim, 0, size - 1)), dim)
    is_new = values >= before if reverse else values > before
    places = torch.arange(size, device=states.device).reshape(-1, *(1,) * (states.dim() - 1 - dim % states.dim()))
    index = torch.where(is_new, places, 0).cummax(dim).values
    running = states.gather(dim, index.narrow(dim, 0, size - 1))
    running = torch.cat((torch.full_like(states.narrow(dim, 0, 1), lowest), running), dim)
    return running.flip(dim) if reverse else running


def _others(states: torch.Tensor, dim: int) -> torch.Tensor:
    """The maximum of all entries but each one."""
    before, after = _exclusive(states, dim, reverse=False), _exclusive(states, dim, reverse=True)
    return torch.where(before >= after, before, after)


def _or_zero(pooled: torch.Tensor) -> torch.Tensor:
    """Zeros for the maximum of nothing."""
    return torch.where(pooled == torch.finfo(pooled.dtype).min, 0.0, pooled)


def attend_grid(call: CombinerCall) -> torch.Tensor:
    """Output `(batch, heads, length, head_dim)` of sequences that are all as long.

    Args:
        call: a sequence in each row, as many heads of keys as of queries.
    """
    length = call.query.shape[2]
    columns = min(call.segment_length, length)
    rows = -(-length // columns)
    padding = rows * columns - length
    precision = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (
        F.pad(states.to(precision), (0, 0, 0, padding)).unflatten(2, (rows, columns))
        for states in (call.query, call.key, call.value)
    )
    # `r`, `c`: row and column of a query or span; `a`, `b`: row and column of a key.
    real = (torch.arange(rows * columns, device=query.device) < length).unflatten(0, (rows, columns))
    row, column = torch.arange(rows, device=query.device), torch.arange(columns, device=query.device)
    earlier_row = row < row[:, None]
    other_row = earlier_row if call.is_causal else row != row[:, None]
    seen_row = other_row if call.is_causal or not call.own_segment_summary else torch.ones_like(other_row)
    other_column = column != column[:, None]
    own_row = (column <= column[:, None] if call.is_causal else torch.ones_like(other_column)) & real[:, None]

    def hidden(states: torch.Tensor) -> torch.Tensor:
        return states.masked_fill(~real[..., None], torch.finfo(states.dtype).min)

    scores = [torch.einsum("...rcd,...rbd->...rcb", query, key)]
    allowed = [own_row]
    sources = [("...rcb,...rbd->...rcd", value)]
    if call.kind != ROWMAJOR:
        scores.append(torch.einsum("...rcd,...acd->...rca", query, key))
        allowed.append(other_row[:, None] & real.T)
        sources.append(("...rca,...acd->...rcd", value))

    if call.kind in ("vertical", "mixture"):
        pooled = [
            _exclusive(states, -3, reverse=False) if call.is_causal else _others(hidden(states), -3)
            for states in (query, key)
        ]
        span_query, span_key = map(_or_zero, pooled)
        members = other_row[:, None] & real.T
        inside = masked_softmax(torch.einsum("...rbd,...abd->...rba", span_query, key) * call.scaling, members)
        scores.append(torch.einsum("...rcd,...rbd->...rcb", query, span_key))
        allowed.append(other_column & members.any(-1)[:, None])
        sources.append(("...rcb,...rbd->...rcd", torch.einsum("...rba,...abd->...rbd", inside, value)))

    for pool, within in _spans_of_rows(call, column):
        members = within & real[:, None]
        if call.kind == ROWMAJOR:
            # Its last token is the query for the columns that a row lacks.
            asking = torch.arange(rows * columns, device=query.device).clamp(max=length - 1)
            span_query = call.query[:, :, asking].to(precision).unflatten(2, (rows, columns))
        else:
            span_query, span_key = (_or_zero(pool(hidden(states), -2)) for states in (query, key))
        inside = masked_softmax(torch.einsum("...acd,...abd->...acb", span_query, key) * call.scaling, members)
        span_value = torch.einsum("...acb,...abd->...acd", inside, value)
        if call.kind == ROWMAJOR:
            span_key = call.row_key(span_value.flatten(2, 3).to(call.query.dtype), call.row_input[:, asking])
            span_key = span_key.to(precision).unflatten(2, (rows, columns))
        scores.append(torch.einsum("...rcd,...acd->...rca", query, span_key))
        allowed.append(seen_row[:, None] & members.any(-1).T)
        sources.append(("...rca,...acd->...rcd", span_value))

    widths = [part.shape[-1] for part in scores]
    allowed = torch.cat([part.expand(rows, columns, -1) for part in allowed], dim=-1)
    joint = masked_softmax(torch.cat(scores, dim=-1) * call.scaling, allowed).split(widths, dim=-1)
    output = sum(torch.einsum(equation, part, source) for part, (equation, source) in zip(joint, sources, strict=True))
    return output.flatten(2, 3)[:, :, :length].to(call.query.dtype)


def _spans_of_rows(call: CombinerCall, column: torch.Tensor):
    """What pools the columns of a row, and which columns a span has, by the column of its query."""
    if call.kind == ROWMAJOR:
        return [(None, torch.ones_like(column == column[:, None]))]
    if call.kind == "horizontal":
        return [(_others, column != column[:, None])]
    if call.kind == "mixture":
        return [
            (lambda states, dim: _exclusive(states, dim, reverse=False), column < column[:, None]),
            (lambda states, dim: _exclusive(states, dim, reverse=True), column > column[:, None]),
        ]
    return []
