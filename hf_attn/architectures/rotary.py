"""The two layouts of projections whose outputs are rotated by position.

Rotary embeddings turn pairs of coordinates of a head. The code of many papers pairs neighbours, (0, 1), (2, 3)...; transformers
pairs the halves, (0, d / 2), (1, d / 2 + 1)... Weights trained for the one become weights for the other by a permutation of
their rows within each head.
"""

import torch


def half_split(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows `(heads * head_dim, ...)` from interleaved pairs to halves within each head."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Inverse of [`half_split`]."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
