"""Layers that several families share."""

import torch
from torch import nn


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, `softmax(scaling * Q K^T + mask) V`, with transformers' attention signature.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, heads, kv_len, head_dim)`.
        value: `(batch, heads, kv_len, value_dim)`.
        attention_mask: added to the logits, broadcast to `(batch, heads, q_len, kv_len)`.

    Returns:
        Output `(batch, q_len, heads, value_dim)` and weights `(batch, heads, q_len, kv_len)`.
    """
    logits = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples while training (arXiv 1603.09382).

    Args:
        drop_prob: probability of dropping the branch of a sample.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        shape = (hidden_states.shape[0], *(1 for _ in hidden_states.shape[1:]))
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """Stochastic depth that grows linearly from 0 to `rate` over all blocks, split into stages of `depths` blocks."""
    steps = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(steps) for _ in range(depth)] for depth in depths]


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Check that `pixel_values` is a batch of images.

    Raises:
        ValueError: if it is missing, is not `(batch, channels, height, width)` or has another number of channels.
    """
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be (batch, channels, height, width), got shape {tuple(pixel_values.shape)}. Add the batch "
            "dimension with `pixel_values[None]` if it is one image."
        )
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has {pixel_values.shape[1]} channels (shape {tuple(pixel_values.shape)}), but the model was "
            f"configured with num_channels={num_channels}. Images come channels first."
        )
