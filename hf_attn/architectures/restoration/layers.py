# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Layers of the window transformers for image restoration.

Maps inside the network are `(batch, height, width, channels)`; seen as `(batch, channels, height, width)` they are in
PyTorch's channels-last memory format, so that tokens and convolutions share them without a copy.
"""

import torch
from torch import nn

from ...attention.window import WINDOW, WindowCall
from ...kernels.bfloat16_cpu import linear
from .configuration import ImageRestorationConfig


#: added to the logit of two tokens that only the cyclic shift made neighbours (not -inf, as for the official weights)
SHIFT_MASK_VALUE = -100.0


class TokenLinear(nn.Linear):
    """`nn.Linear` on `(..., features)`, with the fastest implementation for bfloat16 on this CPU."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight, self.bias)


def pad_to_multiple(pixel_values: torch.Tensor, multiple: int, mode: str = "reflect") -> torch.Tensor:
    """Pad images at the bottom and the right until both sides are multiples of `multiple`.

    Args:
        pixel_values: `(..., height, width)`, of any size from 1x1 up.
        multiple: the sides of the result are multiples of it.
        mode: `"reflect"` mirrors without repeating the edge pixel and adds nothing to a side that fits, as HAT's test
            harness does; `"symmetric"` mirrors with the edge pixel and always adds `1...multiple` rows and columns, as
            DRCT's inference script and `Swin2SRImageProcessor` do. A side that is shorter than its padding is mirrored
            again and again.

    Raises:
        ValueError: for another mode.
    """
    if mode not in ("reflect", "symmetric"):
        raise ValueError(f"The padding mode must be 'reflect' or 'symmetric', got {mode!r}.")
    for dim in (-2, -1):
        size = pixel_values.shape[dim]
        padding = -size % multiple if mode == "reflect" else multiple - size % multiple
        if padding == 0:
            continue
        if mode == "reflect":
            pixel_values = mirror(pixel_values, dim, 0, padding)
            continue
        position = torch.arange(size + padding, device=pixel_values.device) % (2 * size)
        position = torch.where(position < size, position, 2 * size - 1 - position)
        pixel_values = pixel_values.index_select(dim, position)
    return pixel_values


def mirror(pixel_values: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    """Pad a dimension by mirroring it without repeating the edge, as often as it takes."""
    size = pixel_values.shape[dim]
    period = max(2 * size - 2, 1)
    position = torch.arange(-before, size + after, device=pixel_values.device) % period
    position = torch.where(position < size, position, period - position)
    return pixel_values.index_select(dim, position)


def partition_windows(feature_map: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cut `(batch, height, width, channels)` into `(batch * windows, window_size**2, channels)`, row by row."""
    batch_size, height, width, num_channels = feature_map.shape
    windows = feature_map.reshape(
        batch_size, height // window_size, window_size, width // window_size, window_size, num_channels
    )
    return windows.transpose(2, 3).reshape(-1, window_size**2, num_channels)


def merge_windows(windows: torch.Tensor, window_size: int, height: int, width: int) -> torch.Tensor:
    """Inverse of [`partition_windows`]."""
    windows = windows.reshape(
        -1, height // window_size, width // window_size, window_size, window_size, windows.shape[-1]
    )
    return windows.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def shift_mask(window_size: int, shift_size: int, last_row: bool, last_column: bool, like: torch.Tensor):
    """Additive mask, `(1, 1, window_size**2, window_size**2)`, of a window of a shifted map; None if all may attend.

    Only windows of the last row and of the last column hold tokens from opposite borders of the image.
    """
    if not last_row and not last_column:
        return None
    wrapped = torch.arange(window_size, device=like.device) >= window_size - shift_size
    rows = (wrapped & last_row)[:, None].expand(-1, window_size).flatten()
    columns = (wrapped & last_column)[None, :].expand(window_size, -1).flatten()
    apart = (rows[:, None] != rows) | (columns[:, None] != columns)
    return (apart * SHIFT_MASK_VALUE).to(like.dtype)[None, None]


class WindowAttentionBase(nn.Module):
    """Projections, relative position table and attention of windows of any kind.

    Args:
        config: configuration of the model.
        dim: width of the tokens.
        num_heads: number of heads.
        table_side: side of the square of relative positions.
    """

    is_causal = False

    def __init__(self, config: ImageRestorationConfig, dim: int, num_heads: int, table_side: int):
        super().__init__()
        self.config = config
        self.window_size = config.window_size
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scaling = config.qk_scale or self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_side**2, num_heads))
        self.qkv = TokenLinear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = TokenLinear(dim, dim)

    def relative_position_index(self, device: torch.device) -> torch.Tensor:
        """Row of the table for each pair, `(query_len, key_len)`."""
        raise NotImplementedError

    def position_bias(self, like: torch.Tensor) -> torch.Tensor:
        """`(1, num_heads, query_len, key_len)`."""
        index = self.relative_position_index(like.device)
        table = self.relative_position_bias_table.to(like.dtype)
        return nn.functional.embedding(index, table).permute(2, 0, 1)[None]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend in each window.

        Args:
            query: `(windows, num_heads, query_len, head_dim)`.
            key, value: `(windows, num_heads, key_len, head_dim)`.
            position_bias: `(1, num_heads, query_len, key_len)`.
            attention_mask: additive, `(1, 1, query_len, key_len)`.

        Returns:
            `(windows, query_len, num_heads * head_dim)`, and the attention weights if the implementation has them.
        """
        call = WindowCall(
            query,
            key,
            value,
            position_bias=position_bias,
            module=self,
            attention_mask=attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        output, weights = WINDOW(call, self.config._attn_implementation)
        return output.transpose(1, 2).flatten(2), weights


class WindowAttention(WindowAttentionBase):
    """Self-attention in square windows of a map, optionally shifted (W-MSA and SW-MSA of Swin).

    The shift is cyclic. Windows inside the image need no mask; they are attended to apart from the ones at the seams, so
    that no mask is made for each window of the image.
    """

    def __init__(self, config: ImageRestorationConfig, dim: int, num_heads: int, shift_size: int = 0):
        super().__init__(config, dim, num_heads, table_side=2 * config.window_size - 1)
        self.shift_size = shift_size
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def relative_position_index(self, device: torch.device) -> torch.Tensor:
        position = torch.arange(self.window_size, device=device)
        offset = position[:, None] - position + self.window_size - 1
        index = offset[:, None, :, None] * (2 * self.window_size - 1) + offset[None, :, None, :]
        return index.reshape(self.window_size**2, self.window_size**2)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend on `(batch, height, width, channels)`, both sides multiples of the window; returns the same shape."""
        batch_size, height, width, _ = hidden_states.shape
        window_size, shift_size = self.window_size, self.shift_size
        if shift_size:
            hidden_states = hidden_states.roll((-shift_size, -shift_size), dims=(1, 2))
            bands = [(size, last) for size, last in ((height - window_size, False), (window_size, True)) if size]
            columns = [(size, last) for size, last in ((width - window_size, False), (window_size, True)) if size]
        else:
            bands, columns = [(height, False)], [(width, False)]
        regions = [
            region
            for band in hidden_states.split([size for size, _ in bands], dim=1)
            for region in band.split([size for size, _ in columns], dim=2)
        ]
        windows = torch.cat([partition_windows(region, window_size) for region in regions])
        counts = [batch_size * region.shape[1] * region.shape[2] // window_size**2 for region in regions]

        query, key, value = (
            self.qkv(windows).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        )
        position_bias = self.position_bias(query)
        masks = [
            shift_mask(window_size, shift_size, last_row, last_column, query)
            for _, last_row in bands
            for _, last_column in columns
        ]
        attended = [
            self.attend(*states, position_bias, mask)
            for *states, mask in zip(query.split(counts), key.split(counts), value.split(counts), masks, strict=True)
        ]
        windows = self.dropout(self.proj(torch.cat([output for output, _ in attended])))

        merged = [
            merge_windows(part, window_size, region.shape[1], region.shape[2])
            for part, region in zip(windows.split(counts), regions, strict=True)
        ]
        hidden_states = join(merged, len(columns))
        if shift_size:
            hidden_states = hidden_states.roll((shift_size, shift_size), dims=(1, 2))

        weights = None
        if attended[0][1] is not None:
            grids = [
                part.unflatten(0, (batch_size, region.shape[1] // window_size, region.shape[2] // window_size))
                for (_, part), region in zip(attended, regions, strict=True)
            ]
            weights = join(grids, len(columns)).flatten(0, 2)
        return hidden_states, weights


def join(regions: list[torch.Tensor], num_columns: int) -> torch.Tensor:
    """Assemble a map from regions `(batch, rows, columns, ...)`, given row by row."""
    if len(regions) == 1:
        return regions[0]
    bands = [torch.cat(regions[start : start + num_columns], dim=2) for start in range(0, len(regions), num_columns)]
    return torch.cat(bands, dim=1)


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: ImageRestorationConfig, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = TokenLinear(dim, hidden_dim)
        self.activation = nn.GELU()
        self.fc2 = TokenLinear(hidden_dim, dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class PixelShuffleReconstruction(nn.Module):
    """Features -> image: convolution, LeakyReLU, [convolution, pixel shuffle]..., convolution."""

    num_features = 64

    def __init__(self, config: ImageRestorationConfig):
        super().__init__()
        factors = [3] if config.upscale == 3 else [2] * (config.upscale.bit_length() - 1)
        self.conv_before_upsample = nn.Conv2d(config.embed_dim, self.num_features, 3, padding=1)
        self.activation = nn.LeakyReLU(0.01)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(self.num_features, factor**2 * self.num_features, 3, padding=1) for factor in factors
        )
        self.shuffles = nn.ModuleList(nn.PixelShuffle(factor) for factor in factors)
        self.final_convolution = nn.Conv2d(self.num_features, config.num_channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, embed_dim, height, width)` -> `(batch, num_channels, upscale * height, upscale * width)`."""
        features = self.activation(self.conv_before_upsample(features))
        for convolution, shuffle in zip(self.convolutions, self.shuffles, strict=True):
            features = shuffle(convolution(features))
        return self.final_convolution(features)
