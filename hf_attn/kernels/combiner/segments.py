"""The plan `fixed`: one call of PyTorch's attention for each segment, over its own tokens and the summaries of the others."""

import torch
from torch.nn import functional as F

from .call import CombinerCall
from .softmax import attend, local_expectations


def pool_segments(states: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool whole segments `(..., segment_length, head_dim)`; of equal maxima the first gets the gradient."""
    if pool != "max":
        return getattr(states, pool)(-2)
    # `amax` is several times faster, and shares the gradient among equal maxima.
    return states.max(-2).values if states.requires_grad and torch.is_grad_enabled() else states.amax(-2)


def summaries(query, key, value, pool: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole segments.

    Args:
        query, key, value: `(batch, heads, segments, segment_length, head_dim)`.

    Returns:
        Keys and values `(batch, heads, segments, head_dim)`.
    """
    span_query, span_key = pool_segments(query, pool), pool_segments(key, pool)
    return span_key, local_expectations(span_query, key, value, scaling)


def attend_fixed(call: CombinerCall, valid: torch.Tensor | None) -> torch.Tensor:
    """Output `(batch, heads, length, head_dim)` of sequences.

    Args:
        call: a sequence in each row, as many heads of keys as of queries.
        valid: boolean `(batch, length)`, false where a sequence is over; not needed for causal attention.
    """
    length = call.query.shape[2]
    segment_length = min(call.segment_length, length)
    segments = -(-length // segment_length)
    padding = segments * segment_length - length
    query, key, value = (
        (F.pad(states, (0, 0, 0, padding)) if padding else states).unflatten(2, (segments, segment_length))
        for states in (call.query, call.key, call.value)
    )
    form = _attend_causal if call.is_causal else _attend_all
    return form(call, query, key, value, valid)[:, :, :length]


def _attend_causal(call: CombinerCall, query, key, value, valid) -> torch.Tensor:
    segments, segment_length = query.shape[2:4]
    # The last segment's is not seen; a slice without it would be copied.
    span_key, span_value = summaries(query, key, value, call.pool, call.scaling)
    mask = torch.ones(segment_length, segments + segment_length, dtype=torch.bool, device=query.device)
    mask[:, segments:] = mask[:, segments:].tril()
    outputs = []
    for i, (q, k, v) in enumerate(zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True)):
        outputs.append(
            attend(
                q,
                torch.cat((span_key[:, :, :i], k), dim=2),
                torch.cat((span_value[:, :, :i], v), dim=2),
                allowed=mask[:, segments - i :],
                scaling=call.scaling,
            )
        )
    return torch.cat(outputs, dim=2)


def _attend_all(call: CombinerCall, query, key, value, valid) -> torch.Tensor:
    batch, _, segments, segment_length, _ = query.shape
    length = call.query.shape[2]
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    valid = F.pad(valid, (0, segments * segment_length - length)).unflatten(1, (segments, segment_length))

    inside = valid[:, None, :, :, None]
    if call.pool == "max":
        lowest = torch.finfo(query.dtype).min
        pooled = [torch.where(inside, states, lowest).max(-2).values for states in (query, key)]
    else:
        pooled = [torch.where(inside, states, 0.0).sum(-2) for states in (query, key)]
        if call.pool == "mean":
            pooled = [total / inside.sum(-2).clamp(min=1) for total in pooled]
    filled = valid.any(2)
    span_query, span_key = (torch.where(filled[:, None, :, None], states, 0.0) for states in pooled)
    span_value = local_expectations(span_query, key, value, call.scaling, valid[:, None])

    outputs = []
    for i, (q, k, v) in enumerate(zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True)):
        others = filled.clone()
        others[:, i] &= call.own_segment_summary
        outputs.append(
            attend(
                q,
                torch.cat((span_key, k), dim=2),
                torch.cat((span_value, v), dim=2),
                allowed=torch.cat((others, valid[:, i]), dim=1)[:, None, None].expand(-1, -1, segment_length, -1),
                scaling=call.scaling,
            )
        )
    return torch.cat(outputs, dim=2)
