# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The shell of the image-restoration families: everything around their residual groups.

F0 = conv(range * (x - mean));  T = groups(norm(F0));  F = conv(norm(T)) + F0;  y = reconstruction(F) / range + mean
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ImageSuperResolutionOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.hub import HubModelMixin

from ..layers import check_pixel_values, drop_path_rates, refuse_free_size_in_export
from .configuration import ImageRestorationConfig
from .layers import PixelShuffleReconstruction, WindowAttentionBase, pad_to_multiple


#: mean of the RGB training images, which all the published models subtract
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class ImageRestorationEmbeddings(nn.Module):
    """Map -> tokens `(batch, height * width, embed_dim)`, normalised and with an optional position embedding."""

    def __init__(self, config: ImageRestorationConfig):
        super().__init__()
        self.image_size = config.image_size
        self.layernorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps) if config.patch_norm else None
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, config.image_size**2, config.embed_dim))
            if config.use_absolute_embeddings
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        height, width = feature_map.shape[2:]
        hidden_states = feature_map.flatten(2).transpose(1, 2)
        if self.layernorm is not None:
            hidden_states = self.layernorm(hidden_states)
        if self.position_embeddings is not None:
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"This model has absolute position embeddings for inputs of {self.image_size}x{self.image_size}, "
                    f"but got {height}x{width} (after padding). Process the image in tiles of {self.image_size}."
                )
            hidden_states = hidden_states + self.position_embeddings
        return self.dropout(hidden_states)


class ImageRestorationPreTrainedModel(HubModelMixin, PreTrainedModel):
    """Loading, saving and initialisation of the families."""

    config: ImageRestorationConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss of a forward is a mean, which Trainer has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Truncated normal for linear layers and position tables; PyTorch's own for convolutions, as the official code."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WindowAttentionBase):
            init.trunc_normal_(module.relative_position_bias_table, std=std)
        elif isinstance(module, ImageRestorationEmbeddings) and module.position_embeddings is not None:
            init.trunc_normal_(module.position_embeddings, std=std)


class ImageRestorationModelMixin:
    """Base model of a family: image -> features, without the reconstruction.

    A family sets `group_class`; a group is built from `(config, index, drop_path_rates)` and maps tokens
    `(batch, height * width, embed_dim)` and `(height, width)` to tokens.
    """

    group_class: type[nn.Module]

    def __init__(self, config: ImageRestorationConfig):
        super().__init__(config)
        self.first_convolution = nn.Conv2d(config.num_channels, config.embed_dim, 3, padding=1)
        self.embeddings = ImageRestorationEmbeddings(config)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.groups = nn.ModuleList(self.group_class(config, index, rates[index]) for index in range(len(rates)))
        self.layernorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.conv_after_body = (
            nn.Conv2d(config.embed_dim, config.embed_dim, 3, padding=1)
            if config.resi_connection == "1conv"
            else nn.Identity()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.first_convolution

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images in [0, 1], of any size; padded inside to multiples of the window.

        Returns:
            `last_hidden_state` is the feature map `(batch_size, embed_dim, padded_height, padded_width)`; with
            `output_hidden_states` there are the tokens before and after each group, and with `output_attentions` (and
            `attn_implementation="eager"`) the weights of each attention module,
            `(batch_size * windows, num_heads, window_size**2, key_length)`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        refuse_free_size_in_export(
            pixel_values.shape[2:], "The division of its feature map into shifted windows depends on the image size."
        )
        pixel_values = pad_to_multiple(pixel_values, self._padded_multiple(pixel_values))
        mean = image_mean(self.config, pixel_values)
        pixel_values = (pixel_values - mean) * self.config.img_range

        shallow = self.first_convolution(pixel_values.to(self.first_convolution.weight.dtype))
        height, width = shallow.shape[2:]
        hidden_states = self.embeddings(shallow)
        for group in self.groups:
            hidden_states = group(hidden_states, (height, width))
        hidden_states = self.layernorm(hidden_states)
        features = self.conv_after_body(hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)) + shallow
        return BaseModelOutput(last_hidden_state=features)

    def _padded_multiple(self, pixel_values: torch.Tensor) -> int:
        config = self.config
        fits = max(pixel_values.shape[2:]) <= config.image_size
        # Absolute embeddings are of images of one size, which smaller ones are padded to.
        return config.image_size if config.use_absolute_embeddings and fits else config.window_size


class ForImageSuperResolutionMixin:
    """Base model and reconstruction. A family sets `model_class`."""

    model_class: type[PreTrainedModel]

    def __init__(self, config: ImageRestorationConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.reconstruction = PixelShuffleReconstruction(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageSuperResolutionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images in [0, 1], of any size from 1x1 up.
            labels (`torch.Tensor` of shape `(batch_size, num_channels, upscale * height, upscale * width)`, *optional*):
                Target images in [0, 1]; if given, a loss is returned (`config.loss_type`).

        Returns:
            `reconstruction` has the shape of `labels`. It is not clamped, and is float32 also in a half-precision model,
            whose steps would be coarser than those of 8-bit images.
        """
        outputs = self.base_model(pixel_values, **kwargs)
        height, width = (self.config.upscale * size for size in pixel_values.shape[2:])
        reconstruction = self.reconstruction(outputs.last_hidden_state)[..., :height, :width]
        reconstruction = reconstruction.to(torch.promote_types(reconstruction.dtype, torch.float32))
        reconstruction = reconstruction / self.config.img_range + image_mean(self.config, reconstruction)

        loss = None
        if labels is not None:
            if labels.shape != reconstruction.shape:
                raise ValueError(
                    f"labels must have the shape of the reconstruction, {tuple(reconstruction.shape)} at upscale "
                    f"{self.config.upscale}, got {tuple(labels.shape)}."
                )
            distance = nn.functional.l1_loss if self.config.loss_type == "l1" else nn.functional.mse_loss
            loss = distance(reconstruction, labels.to(reconstruction.device, reconstruction.dtype))
        return ImageSuperResolutionOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def image_mean(config: ImageRestorationConfig, like: torch.Tensor) -> torch.Tensor:
    """The mean that is taken off the image, `(1, num_channels or 1, 1, 1)`."""
    mean = RGB_MEAN if config.num_channels == 3 else (0.0,)
    return like.new_tensor(mean).view(1, -1, 1, 1)
