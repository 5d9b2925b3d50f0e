# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers whose linear maps are all sigma-reparametrised (arXiv 2303.06296), without LayerNorm."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit.modeling_beit import BeitDropPath
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.hub import HubModelMixin
from hf_attn.patching.sigma_reparam import SigmaReparamConv2d, SigmaReparamLayer, SigmaReparamLinear

from .configuration_sigma_reparam import SigmaReparamViTConfig


def _linear_class(config: SigmaReparamViTConfig) -> type[nn.Linear]:
    return SigmaReparamLinear if config.reparametrised else nn.Linear


class SigmaReparamViTEmbeddings(ViTEmbeddings):
    def __init__(self, config: SigmaReparamViTConfig):
        super().__init__(config)
        plain = self.patch_embeddings.projection
        convolution = SigmaReparamConv2d if config.reparametrised else nn.Conv2d
        self.patch_embeddings.projection = convolution(
            plain.in_channels, plain.out_channels, kernel_size=plain.kernel_size, stride=plain.stride
        )
        self.patch_embeddings.projection.init_multiplier = config.patch_embedding_init_multiplier
        if not config.use_class_token:
            self.cls_token = None
            self.position_embeddings = nn.Parameter(self.position_embeddings.detach()[:, 1:].clone())

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """Tokens of images; without a class token those of the patches alone. Arguments as of [`ViTModel`]."""
        if self.cls_token is not None:
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        if bool_masked_pos is not None:
            raise ValueError("This model has no mask token: bool_masked_pos is not supported.")
        height, width = pixel_values.shape[-2:]
        positions = self.position_embeddings
        if (height, width) != tuple(self.image_size):
            if not interpolate_pos_encoding:
                raise ValueError(
                    f"Images are {height} x {width}, and the model is for {self.image_size[0]} x {self.image_size[1]}. Resize them, "
                    "or pass interpolate_pos_encoding=True."
                )
            patch = self.patch_embeddings.patch_size
            grid, new_grid = (
                [side // p for side, p in zip(size, patch, strict=True)] for size in (self.image_size, (height, width))
            )
            positions = nn.functional.interpolate(
                positions.unflatten(1, grid).permute(0, 3, 1, 2), size=new_grid, mode="bicubic", align_corners=False
            )
            positions = positions.flatten(2).transpose(1, 2)
        return self.dropout(self.patch_embeddings(pixel_values) + positions)


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
        self.dropout = nn.Sequential(nn.Dropout(config.hidden_dropout_prob), BeitDropPath(drop_path_rate))


class SigmaReparamViTPreTrainedModel(HubModelMixin, ViTPreTrainedModel):
    config: SigmaReparamViTConfig
    _no_split_modules = ["SigmaReparamViTEmbeddings", "SigmaReparamViTLayer"]
    _can_record_outputs = {"hidden_states": SigmaReparamViTLayer, "attentions": SigmaReparamViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, SigmaReparamViTEmbeddings) and module.cls_token is None:
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
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
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
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
            attention_mask: `(batch, tokens)`, 0 for tokens that no other may see.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.layernorm(hidden_states))


class SigmaReparamViTForImageClassification(SigmaReparamViTPreTrainedModel, ViTForImageClassification):
    """The encoder with a classifier on its class token, or on the mean of its other tokens."""

    def __init__(self, config: SigmaReparamViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = SigmaReparamViTModel(config)
        self.classifier = (
            _linear_class(config)(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            labels: `(batch,)` class indices, or for regression `(batch,)` or `(batch, num_labels)`.
            interpolate_pos_encoding: resize the position embeddings for images of another size than `image_size`.
            attention_mask: `(batch, tokens)`, 0 for tokens that no other may see.
        """
        outputs = self.vit(pixel_values, interpolate_pos_encoding, attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        if self.config.pooling == "token":
            pooled = hidden_states[:, 0]
        else:
            pooled = hidden_states[:, int(self.config.use_class_token) :].mean(dim=1)
        logits = self.classifier(pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["SigmaReparamViTForImageClassification", "SigmaReparamViTModel", "SigmaReparamViTPreTrainedModel"]
