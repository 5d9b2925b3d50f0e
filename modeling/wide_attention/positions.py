"""Position embeddings without parameters."""

import torch


def sinusoids(position_ids: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Position embeddings `(..., size)`: sines in even channels, cosines in odd ones."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size)
    angles = position_ids[..., None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :size].to(dtype)
