# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""HAT, the hybrid attention transformer for image restoration (arXiv 2309.05239)."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.architectures.layers import DropPath, squeeze_excitation
from hf_attn.architectures.restoration.layers import (
    MLP,
    WindowAttention,
    WindowAttentionBase,
    merge_windows,
    partition_windows,
)
from hf_attn.architectures.restoration.modeling import (
    ForImageSuperResolutionMixin,
    ImageRestorationModelMixin,
    ImageRestorationPreTrainedModel,
)

from .configuration_hat import HATConfig


class HATChannelBranch(nn.Module):
    """Two convolutions and a channel attention (CAB), on the input of the window attention."""

    def __init__(self, config: HATConfig):
        super().__init__()
        compressed = config.embed_dim // config.compress_ratio
        squeezed = config.embed_dim // config.squeeze_factor
        self.conv1 = nn.Conv2d(config.embed_dim, compressed, 3, padding=1)
        self.activation = nn.GELU()
        self.conv2 = nn.Conv2d(compressed, config.embed_dim, 3, padding=1)
        self.squeeze = nn.Conv2d(config.embed_dim, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, config.embed_dim, 1)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """`(batch, embed_dim, height, width)` -> the same shape. The attention averages over the whole map."""
        feature_map = self.conv2(self.activation(self.conv1(feature_map)))
        return squeeze_excitation(feature_map, feature_map.mean(dim=(2, 3), keepdim=True), self.squeeze, self.excite)


class HATBlock(GradientCheckpointingLayer):
    """Hybrid attention block (HAB): window attention plus `conv_scale` times channel attention, then an MLP."""

    def __init__(self, config: HATConfig, num_heads: int, shift_size: int, drop_path_rate: float):
        super().__init__()
        dim = config.embed_dim
        self.conv_scale = config.conv_scale
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = WindowAttention(config, dim, num_heads, shift_size)
        self.channel_branch = HATChannelBranch(config)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config, dim, int(dim * config.mlp_ratio))

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `(batch, height * width, embed_dim)` and `(height, width)` -> tokens."""
        normed = self.layernorm_before(hidden_states).unflatten(1, size)
        channel_branch = self.channel_branch(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        window_branch, _ = self.attention(normed)
        hidden_states = hidden_states + self.drop_path(window_branch).flatten(1, 2)
        hidden_states = hidden_states.add(channel_branch.flatten(1, 2), alpha=self.conv_scale)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class HATOverlappingAttention(WindowAttentionBase):
    """Attention of each window to a larger window around it (OCA).

    Keys and values beyond the border are zero vectors: they enter the softmax with their position bias only.
    """

    def __init__(self, config: HATConfig, num_heads: int):
        table_side = config.window_size + config.overlap_window_size - 1
        super().__init__(config, config.embed_dim, num_heads, table_side)
        self.overlap_window_size = config.overlap_window_size

    def relative_position_index(self, device: torch.device) -> torch.Tensor:
        # Key minus query, from the corners of their own windows, plus an offset that leaves many indices negative: the
        # official weights were trained with these, wrapped around the table.
        side = self.window_size + self.overlap_window_size - 1
        query = torch.arange(self.window_size, device=device)
        key = torch.arange(self.overlap_window_size, device=device)
        offset = key - query[:, None] + self.window_size - self.overlap_window_size + 1
        index = offset[:, None, :, None] * side + offset[None, :, None, :]
        return index.reshape(self.window_size**2, self.overlap_window_size**2) % side**2

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, height, width, embed_dim)` -> the same shape, and the weights if there are any."""
        height, width, dim = hidden_states.shape[1:]
        query, key_value = self.qkv(hidden_states).split([dim, 2 * dim], dim=-1)
        query = partition_windows(query, self.window_size).unflatten(-1, (self.num_heads, self.head_dim))

        margin = (self.overlap_window_size - self.window_size) // 2
        key_value = nn.functional.pad(key_value, (0, 0, margin, margin, margin, margin))
        # (batch, rows, columns, 2 * dim, window, window), a view
        key_value = key_value.unfold(1, self.overlap_window_size, self.window_size)
        key_value = key_value.unfold(2, self.overlap_window_size, self.window_size)
        key_value = key_value.unflatten(3, (2, self.num_heads, self.head_dim)).permute(3, 0, 1, 2, 4, 6, 7, 5)
        key, value = key_value.reshape(2, -1, self.num_heads, self.overlap_window_size**2, self.head_dim).unbind()

        query = query.transpose(1, 2)
        output, weights = self.attend(query, key, value, self.position_bias(query))
        return merge_windows(self.proj(output), self.window_size, height, width), weights


class HATOverlappingBlock(GradientCheckpointingLayer):
    """Overlapping cross-attention block (OCAB): the attention above, then an MLP."""

    def __init__(self, config: HATConfig, num_heads: int):
        super().__init__()
        dim = config.embed_dim
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = HATOverlappingAttention(config, num_heads)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config, dim, int(dim * config.mlp_ratio))
        # The official block has no dropout.
        self.mlp.dropout.p = 0.0

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `(batch, height * width, embed_dim)` and `(height, width)` -> tokens."""
        attended, _ = self.attention(self.layernorm_before(hidden_states).unflatten(1, size))
        hidden_states = hidden_states + attended.flatten(1, 2)
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class HATGroup(nn.Module):
    """Residual hybrid attention group (RHAG): blocks, shifted in turn, an overlapping block and a convolution."""

    def __init__(self, config: HATConfig, index: int, drop_path_rates: list[float]):
        super().__init__()
        num_heads = config.num_heads[index]
        self.blocks = nn.ModuleList(
            HATBlock(config, num_heads, shift_size=config.window_size // 2 if block % 2 else 0, drop_path_rate=rate)
            for block, rate in enumerate(drop_path_rates)
        )
        self.overlapping_block = HATOverlappingBlock(config, num_heads)
        self.convolution = (
            nn.Conv2d(config.embed_dim, config.embed_dim, 3, padding=1)
            if config.resi_connection == "1conv"
            else nn.Identity()
        )

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `(batch, height * width, embed_dim)` and `(height, width)` -> tokens."""
        residual = hidden_states
        for block in self.blocks:
            hidden_states = block(hidden_states, size)
        hidden_states = self.overlapping_block(hidden_states, size)
        feature_map = self.convolution(hidden_states.unflatten(1, size).permute(0, 3, 1, 2))
        return feature_map.permute(0, 2, 3, 1).flatten(1, 2) + residual


class HATPreTrainedModel(ImageRestorationPreTrainedModel):
    config: HATConfig
    base_model_prefix = "hat"
    _no_split_modules = ["HATBlock", "HATOverlappingBlock"]
    _can_record_outputs = {"hidden_states": HATGroup, "attentions": WindowAttentionBase}


class HATModel(ImageRestorationModelMixin, HATPreTrainedModel):
    """HAT without its reconstruction: images to features."""

    group_class = HATGroup


class HATForImageSuperResolution(ForImageSuperResolutionMixin, HATPreTrainedModel):
    """HAT for super-resolution, and with `upscale=1` for restoration at the same size."""

    model_class = HATModel


__all__ = ["HATForImageSuperResolution", "HATModel", "HATPreTrainedModel"]
