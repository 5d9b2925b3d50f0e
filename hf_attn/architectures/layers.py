"""Layers that several families share."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..attention.softmax import eager_attention_forward


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


def make_layer_scale(width: int, initial_value: float | None) -> nn.Parameter | None:
    """A learned factor for each channel of a residual branch (arXiv 2103.17239), or none."""
    return None if initial_value is None else nn.Parameter(torch.full((width,), float(initial_value)))


def scaled(hidden_states: torch.Tensor, layer_scale: torch.Tensor | None) -> torch.Tensor:
    """`(..., width)` times a layer scale, if there is one."""
    return hidden_states if layer_scale is None else layer_scale * hidden_states


def squeeze_excitation(
    hidden_states: torch.Tensor,
    average: torch.Tensor,
    squeeze: nn.Module,
    excite: nn.Module,
    gate: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> torch.Tensor:
    """Multiply each channel by `gate(excite(ReLU(squeeze(average))))` (arXiv 1709.01507).

    Args:
        hidden_states: of any shape.
        average: mean of `hidden_states` over all positions, with dimensions of size 1 in their place.
        squeeze, excite: layers over the channels, to a few channels and back.
        gate: activation of the gate.
    """
    return hidden_states * gate(excite(squeeze(average).relu()))


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a map `(batch, channels, height, width)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class ChannelsLastDepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map `(batch, height, width, channels)` that keeps its size."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def refuse_free_size_in_export(sides: Iterable[int], reason: str) -> None:
    """Raise `ValueError` where a model that depends on the size of the image is exported with a size left free.

    Args:
        sides: height and width of the map; symbols if they are free.
        reason: why the exported graph would be of one size only, as a sentence.
    """
    if torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in sides):
        raise ValueError(
            f"This model cannot be exported with dynamic height and width. {reason} Export it for a fixed size."
        )


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Check that `pixel_values` is a batch of images.

    Raises:
        ValueError: if it is missing or empty, is not `(batch, channels, height, width)`, has another number of channels or
            is not of floating-point numbers.
    """
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must have the shape (batch, channels, height, width), got {tuple(pixel_values.shape)}. For "
            "a single image, add the batch dimension with `pixel_values[None]`."
        )
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has {pixel_values.shape[1]} channels (shape {tuple(pixel_values.shape)}), but the model was "
            f"configured with num_channels={num_channels}. Channels come first."
        )
    if 0 in pixel_values.shape:
        raise ValueError(f"pixel_values is empty: its shape is {tuple(pixel_values.shape)}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            "pixel_values must be floating-point numbers, as returned by an image processor; got "
            f"{pixel_values.dtype}."
        )


__all__ = [
    "ChannelLayerNorm",
    "ChannelsLastDepthwiseConv",
    "DropPath",
    "check_pixel_values",
    "drop_path_rates",
    "eager_attention_forward",
    "make_layer_scale",
    "refuse_free_size_in_export",
    "scaled",
    "squeeze_excitation",
]
