# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""DRCT, the dense-residual-connected transformer for super-resolution (arXiv 2404.00722)."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.architectures.layers import DropPath
from hf_attn.architectures.restoration.layers import MLP, WindowAttention, WindowAttentionBase
from hf_attn.architectures.restoration.modeling import (
    ForImageSuperResolutionMixin,
    ImageRestorationModelMixin,
    ImageRestorationPreTrainedModel,
)

from .configuration_drct import DRCTConfig


class DRCTBlock(GradientCheckpointingLayer):
    """Swin transformer block: window attention, then an MLP, both after a norm and with a residual."""

    def __init__(
        self, config: DRCTConfig, dim: int, num_heads: int, shift_size: int, mlp_ratio: float, drop_path_rate: float
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = WindowAttention(config, dim, num_heads, shift_size)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config, dim, int(dim * mlp_ratio))

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `(batch, height * width, dim)` and `(height, width)` -> tokens."""
        attended, _ = self.attention(self.layernorm_before(hidden_states).unflatten(1, size))
        hidden_states = hidden_states + self.drop_path(attended).flatten(1, 2)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class DRCTGroup(nn.Module):
    """Residual dense group (RDG): five blocks; the input of each is the input of the group and the outputs of all earlier blocks.

    X_k = LeakyReLU(W_k Swin_k([X, X_1, ..., X_{k-1}])),  k = 1...4;   X + 0.2 W_5 Swin_5([X, X_1, ..., X_4])
    """

    residual_scale = 0.2

    def __init__(self, config: DRCTConfig, index: int, drop_path_rates: list[float]):
        super().__init__()
        dims, heads = config.block_dims(), config.block_heads(index)
        self.blocks = nn.ModuleList(
            DRCTBlock(
                config,
                dim,
                num_heads,
                shift_size=config.window_size // 2 if block % 2 else 0,
                # Fixed in the official code for the two widest blocks.
                mlp_ratio=config.mlp_ratio if block < 3 else 1,
                drop_path_rate=drop_path_rates[0],
            )
            for block, (dim, num_heads) in enumerate(zip(dims, heads, strict=True))
        )
        self.adjust = nn.ModuleList(
            nn.Conv2d(dim, config.growth_channels if block < 4 else config.embed_dim, 1)
            for block, dim in enumerate(dims)
        )
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `(batch, height * width, embed_dim)` and `(height, width)` -> tokens."""
        residual = hidden_states
        for block, adjust in zip(self.blocks[:-1], self.adjust[:-1], strict=True):
            grown = self.activation(self._adjust(adjust, block(hidden_states, size), size))
            hidden_states = torch.cat((hidden_states, grown), dim=-1)
        output = self._adjust(self.adjust[-1], self.blocks[-1](hidden_states, size), size)
        return residual.add(output, alpha=self.residual_scale)

    @staticmethod
    def _adjust(convolution: nn.Conv2d, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return convolution(hidden_states.unflatten(1, size).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)


class DRCTPreTrainedModel(ImageRestorationPreTrainedModel):
    config: DRCTConfig
    base_model_prefix = "drct"
    _no_split_modules = ["DRCTBlock"]
    _can_record_outputs = {"hidden_states": DRCTGroup, "attentions": WindowAttentionBase}


class DRCTModel(ImageRestorationModelMixin, DRCTPreTrainedModel):
    """DRCT without its reconstruction: images to features."""

    group_class = DRCTGroup


class DRCTForImageSuperResolution(ForImageSuperResolutionMixin, DRCTPreTrainedModel):
    """DRCT for super-resolution, and with `upscale=1` for restoration at the same size."""

    model_class = DRCTModel


__all__ = ["DRCTForImageSuperResolution", "DRCTModel", "DRCTPreTrainedModel"]
