"""The softmax over the spans and inside of them that the forms of Combiner attention share."""

import torch
from torch.nn import functional as F


#: with fewer keys fused attention is not faster, and less exact
FEW_KEYS = 32


def masked_softmax(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax over the allowed entries, at least in float32; zeros where there is none."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(precision).masked_fill(~allowed, torch.finfo(precision).min)
    return logits.softmax(dim=-1).masked_fill(~allowed, 0.0)


def local_expectations(
    span_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of spans, the means of their tokens' values under the spans' own queries.

    Args:
        span_query: `(..., head_dim)`.
        key, value: of the tokens of each span, `(..., tokens, head_dim)`.
        scaling: factor of the scores.
        allowed: boolean, broadcast to `(..., tokens)`, which tokens a span has; all if not given.
    """
    logits = (span_query[..., None, :] @ key.transpose(-1, -2))[..., 0, :] * scaling
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=key.device)
    weights = masked_softmax(logits, allowed).to(value.dtype)
    return (weights[..., None, :] @ value)[..., 0, :]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention `(..., queries, head_dim)` under a boolean mask; zeros for a query without allowed keys."""
    if key.shape[-2] >= FEW_KEYS:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    weights = masked_softmax(query @ key.transpose(-1, -2) * scaling, allowed)
    return weights.to(value.dtype) @ value
