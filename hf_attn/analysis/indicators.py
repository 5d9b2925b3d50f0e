"""Indicators of attention maps (arXiv 2510.11602): how spread, concentrated, local and diverse they are."""

import torch

from .entropy import attention_entropy


#: distances whose focus is measured
DISTANCES = (0, 1, 2, 3)


def attention_indicators(attention: torch.Tensor) -> dict[str, torch.Tensor]:
    """Indicators of each map.

    Args:
        attention: probabilities `(..., length, length)`.

    Returns:
        `(...)` each: `entropy`, `-sum a log a` over the whole map in nats; `concentration`, its Frobenius norm; `sink`, the mean
        weight of the first token; `focus_N`, the mean weight of the token N before (NaN for maps that are not longer than N).
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    indicators = {
        "entropy": attention_entropy(attention).sum(-1),
        "concentration": torch.linalg.matrix_norm(attention),
        "sink": attention[..., 0].mean(-1),
    }
    for distance in DISTANCES:
        indicators[f"focus_{distance}"] = attention.diagonal(-distance, -2, -1).mean(-1)
    return indicators


def head_diversity(attention: torch.Tensor) -> torch.Tensor:
    """How much heads differ: the standard deviation over heads of each entry, averaged over the lower triangle.

    Args:
        attention: `(..., heads, length, length)`.

    Returns:
        `(...)`.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    length = attention.shape[-1]
    spread = attention.std(-3, correction=0).tril()
    return spread.sum((-2, -1)) * 2 / (length * (length + 1))
