# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers whose linear maps are all sigma-reparametrised (arXiv 2303.06296), without LayerNorm."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.architectures.image_classification import ImageClassifierMixin
from hf_attn.architectures.layers import DropPath, check_pixel_values, drop_path_rates
from hf_attn.hub import HubModelMixin
from hf_attn.patching.sigma_reparam import SigmaReparamConv2d, SigmaReparamLayer, SigmaReparamLinear

from .configuration_sigma_reparam import SigmaReparamViTConfig


def _linear_class(config: SigmaReparamViTConfig) -> type[nn.Linear]:
    return SigmaReparamLinear if config.reparametrised else nn.Linear


class SigmaReparamViTEmbeddings(ViTEmbeddings):
    """ViT's embeddings with a reparametrised projection, and with or without a class token."""

    def __init__(self, config: SigmaReparamViTConfig):
        super().__init__(config)
        patches = self.patch_embeddings
        plain = patches.projection
        convolution = SigmaReparamConv2d if config.reparametrised else nn.Conv2d
        patches.projection = convolution(
            plain.in_channels, plain.out_channels, kernel_size=plain.kernel_size, stride=plain.stride
        )
        patches.projection.init_multiplier = config.patch_embedding_init_multiplier
        self.grid_size = tuple(
            side // patch for side, patch in zip(patches.image_size, patches.patch_size, strict=True)
        )
        if not config.use_class_token:
            self.cls_token = None
            self.position_embeddings = nn.Parameter(torch.zeros(1, patches.num_patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = False) -> torch.Tensor:
        """`(batch, num_channels, height, width)` -> tokens `(batch, tokens, hidden_size)`, a class token first."""
        patches = self.patch_embeddings
        check_pixel_values(pixel_values, patches.num_channels)
        size = tuple(pixel_values.shape[2:])
        if size != tuple(patches.image_size) and not interpolate_pos_encoding:
            raise ValueError(
                f"The images are {size[0]} x {size[1]}, but the position embeddings are for "
                f"{' x '.join(map(str, patches.image_size))}. Resize the images, or pass "
                "interpolate_pos_encoding=True."
            )
        hidden_states = patches(pixel_values.to(self.position_embeddings.dtype))
        if self.cls_token is not None:
            hidden_states = torch.cat([self.cls_token.expand(len(hidden_states), -1, -1), hidden_states], dim=1)
        grid_size = tuple(side // patch for side, patch in zip(size, patches.patch_size, strict=True))
        return self.dropout(hidden_states + self._position_embeddings(grid_size))

    def _position_embeddings(self, grid_size: tuple[int, int]) -> torch.Tensor:
        if grid_size == self.grid_size:
            return self.position_embeddings
        prefix = self.position_embeddings.shape[1] - self.patch_embeddings.num_patches
        of_patches = self.position_embeddings[:, prefix:].unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        of_patches = nn.functional.interpolate(of_patches, size=grid_size, mode="bicubic", align_corners=False)
        return torch.cat([self.position_embeddings[:, :prefix], of_patches.flatten(2).transpose(1, 2)], dim=1)


class SigmaReparamViTAttention(ViTAttention):
    """ViT's attention with queries, keys and values as one matrix, which has one gamma."""

    def __init__(self, config: SigmaReparamViTConfig):
        super().__init__(config)
        del self.q_proj, self.k_proj, self.v_proj
        inner_size = self.num_attention_heads * self.head_dim
        linear = _linear_class(config)
        self.qkv = linear(config.hidden_size, 3 * inner_size, bias=config.qkv_bias)
        self.o_proj = linear(inner_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_attention_heads, self.head_dim))
        query_states, key_states, value_states = qkv.permute(2, 0, 3, 1, 4)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(-2)), attn_weights


class SigmaReparamViTLayer(ViTLayer):
    def __init__(self, config: SigmaReparamViTConfig, drop_path_rate: float):
        super().__init__(config)
        self.attention = SigmaReparamViTAttention(config)
        linear = _linear_class(config)
        self.mlp.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.mlp.fc2 = linear(config.intermediate_size, config.hidden_size)
        if not config.use_layer_norm:
            self.layernorm_before = nn.Identity()
            self.layernorm_after = nn.Identity()
        self.dropout = nn.Sequential(nn.Dropout(config.hidden_dropout_prob), DropPath(drop_path_rate))


class SigmaReparamViTPreTrainedModel(HubModelMixin, ViTPreTrainedModel):
    config: SigmaReparamViTConfig
    _no_split_modules = ["SigmaReparamViTEmbeddings", "SigmaReparamViTLayer"]
    _can_record_outputs = {"hidden_states": SigmaReparamViTLayer, "attentions": SigmaReparamViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, SigmaReparamViTEmbeddings):
            for parameter in (module.position_embeddings, module.cls_token):
                if parameter is not None:
                    init.trunc_normal_(parameter, std=self.config.initializer_range)
            return
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            super()._init_weights(module)
            return
        multiplier = getattr(module, "init_multiplier", 1.0)
        init.trunc_normal_(module.weight, std=self.config.initializer_range * multiplier)
        if module.bias is not None:
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        if isinstance(module, SigmaReparamLayer):
            module.reset_spectrum(self.config.spectral_init)


class SigmaReparamViTModel(SigmaReparamViTPreTrainedModel, ViTModel):
    """The encoder without a head."""

    def __init__(self, config: SigmaReparamViTConfig):
        # Not ViTModel's, which would build its own layers first.
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = SigmaReparamViTEmbeddings(config)
        (rates,) = drop_path_rates(config.drop_path_rate, [config.num_hidden_layers])
        self.layers = nn.ModuleList([SigmaReparamViTLayer(config, rate) for rate in rates])
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_layer_norm else nn.Identity()
        )
        self.pooler = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            interpolate_pos_encoding: resize the position embeddings for images of another size than `image_size`.
            attention_mask: `(batch, tokens)`, 0 for masked tokens.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        if self.config.pooling == "token":
            pooled = hidden_states[:, 0]
        else:
            pooled = hidden_states[:, int(self.config.use_class_token) :].mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class SigmaReparamViTForImageClassification(ImageClassifierMixin, SigmaReparamViTPreTrainedModel):
    """The encoder with a reparametrised classifier on its first token, or on the mean of its patches."""

    body_class = SigmaReparamViTModel

    def add_classifiers(self, config: SigmaReparamViTConfig) -> None:
        linear = _linear_class(config)
        self.classifier = linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()


__all__ = ["SigmaReparamViTForImageClassification", "SigmaReparamViTModel", "SigmaReparamViTPreTrainedModel"]
