# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""TNT: a small transformer over the words of each patch inside a transformer over the patches (arXiv 2103.00112)."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_attn.architectures.image_classification import ImageClassifierMixin
from hf_attn.architectures.layers import (
    DropPath,
    check_pixel_values,
    drop_path_rates,
    eager_attention_forward,
    squeeze_excitation,
)
from hf_attn.architectures.staged_vision.modeling import VisionPreTrainedModel

from .configuration_tnt import TNTConfig


class TNTAttention(nn.Module):
    """Softmax attention with one projection for queries and keys together and one for values."""

    is_causal = False

    def __init__(self, config: TNTConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5 if config.qk_scale is None else config.qk_scale
        self.qk_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, tokens, width)` -> the same, and weights `(batch, heads, tokens, tokens)`."""
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (*self.qk_proj(hidden_states).chunk(2, dim=-1), self.v_proj(hidden_states))
        )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.dropout(self.o_proj(output.flatten(-2))), weights


class TNTMLP(nn.Module):
    def __init__(self, config: TNTConfig, hidden_size: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(nn.functional.gelu(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class TNTSqueezeExcitation(nn.Module):
    """Adds to each channel its product with a gate in -1..1, computed from the mean of all tokens."""

    def __init__(self, config: TNTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size // 4)
        self.fc2 = nn.Linear(config.hidden_size // 4, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        average = self.norm(hidden_states.mean(dim=1, keepdim=True))
        return hidden_states + squeeze_excitation(hidden_states, average, self.fc1, self.fc2, gate=torch.tanh)


class TNTWordsToSentence(nn.Module):
    """Projects the concatenated words of a patch to the width of a sentence.

    Args:
        bias: bias of the projection.
        norm_each_word: normalise each word by itself, and not the result (the legacy design).
    """

    def __init__(self, config: TNTConfig, bias: bool, norm_each_word: bool = False):
        super().__init__()
        self.norm_each_word = norm_each_word
        words_size = config.words_per_side**2 * config.inner_hidden_size
        self.norm1 = nn.LayerNorm(
            config.inner_hidden_size if norm_each_word else words_size, eps=config.layer_norm_eps
        )
        self.projection = nn.Linear(words_size, config.hidden_size, bias=bias)
        self.norm2 = nn.Identity() if norm_each_word else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, word_states: torch.Tensor, batch_size: int) -> torch.Tensor:
        """`(batch * patches, words, inner_hidden_size)` -> `(batch, patches, hidden_size)`."""
        if self.norm_each_word:
            word_states = self.norm1(word_states)
        sentences = word_states.reshape(batch_size, word_states.shape[0] // batch_size, -1)
        if not self.norm_each_word:
            sentences = self.norm1(sentences)
        return self.norm2(self.projection(sentences))


class TNTLayer(GradientCheckpointingLayer):
    def __init__(self, config: TNTConfig, drop_path_rate: float):
        super().__init__()

        def layer_norm(width: int) -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=config.layer_norm_eps)

        self.inner_norm1 = layer_norm(config.inner_hidden_size)
        self.inner_attention = TNTAttention(config, config.inner_hidden_size, config.inner_num_attention_heads)
        self.inner_norm2 = layer_norm(config.inner_hidden_size)
        self.inner_mlp = TNTMLP(config, config.inner_hidden_size, config.inner_mlp_ratio)
        self.words_to_sentence = TNTWordsToSentence(config, bias=config.legacy, norm_each_word=config.legacy)
        self.norm1 = layer_norm(config.hidden_size)
        self.attention = TNTAttention(config, config.hidden_size, config.num_attention_heads)
        self.norm2 = layer_norm(config.hidden_size)
        self.mlp = TNTMLP(config, config.hidden_size, config.mlp_ratio)
        self.squeeze_excitation = TNTSqueezeExcitation(config) if config.squeeze_excitation else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, word_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update words, then sentences.

        Args:
            hidden_states: `(batch, 1 + patches, hidden_size)`, the class token first.
            word_states: `(batch * patches, words, inner_hidden_size)`.
        """
        attention_output, _ = self.inner_attention(self.inner_norm1(word_states), **kwargs)
        word_states = word_states + self.drop_path(attention_output)
        word_states = word_states + self.drop_path(self.inner_mlp(self.inner_norm2(word_states)))

        class_token, sentences = hidden_states.split([1, hidden_states.shape[1] - 1], dim=1)
        sentences = sentences + self.words_to_sentence(word_states, hidden_states.shape[0])
        hidden_states = torch.cat([class_token, sentences], dim=1)

        attention_output, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attention_output)
        mlp_output = self.squeeze_excitation(self.mlp(self.norm2(hidden_states)))
        return hidden_states + self.drop_path(mlp_output), word_states


class TNTWordEmbeddings(nn.Module):
    """Words from a 7x7 convolution with stride, by default of each patch by itself, so that nothing leaks between patches."""

    def __init__(self, config: TNTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.words_per_side = config.words_per_side
        self.legacy = config.legacy
        self.projection = nn.Conv2d(
            config.num_channels, config.inner_hidden_size, kernel_size=7, stride=config.inner_stride, padding=3
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.words_per_side**2, config.inner_hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch * patches, words, inner_hidden_size)`, both in row-major order."""
        if self.legacy:
            words = _cut(self.projection(pixel_values), self.words_per_side)
        else:
            words = self.projection(_cut(pixel_values, self.patch_size))
        return words.flatten(2).transpose(1, 2) + self.position_embeddings


def _cut(images: torch.Tensor, side: int) -> torch.Tensor:
    """Cut into squares: `(batch, channels, height, width)` -> `(batch * squares, channels, side, side)`."""
    squares = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


class TNTEmbeddings(nn.Module):
    """Embeds words and, made of them, sentences."""

    def __init__(self, config: TNTConfig):
        super().__init__()
        self.config = config
        self.grid_size = tuple(side // config.patch_size for side in config.image_height_width)
        self.word_embeddings = TNTWordEmbeddings(config)
        self.words_to_sentence = TNTWordsToSentence(config, bias=True)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid_size), config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sentences `(batch, 1 + patches, hidden_size)` and words `(batch * patches, words, inner_hidden_size)`."""
        check_pixel_values(pixel_values, self.config.num_channels)
        pixel_values = pixel_values.to(self.cls_token.dtype)
        grid_size = self._grid_size(*pixel_values.shape[2:], interpolate_pos_encoding)
        word_states = self.word_embeddings(pixel_values)
        batch_size = pixel_values.shape[0]
        sentences = self.words_to_sentence(word_states, batch_size)
        hidden_states = torch.cat([self.cls_token.expand(batch_size, -1, -1), sentences], dim=1)
        return self.dropout(hidden_states + self._position_embeddings(grid_size)), word_states

    def _grid_size(self, height: int, width: int, interpolate_pos_encoding: bool) -> tuple[int, int]:
        if (height, width) != self.config.image_height_width and not interpolate_pos_encoding:
            raise ValueError(
                f"The images are {height} x {width}, but the position embeddings are for "
                f"{' x '.join(map(str, self.config.image_height_width))}. Resize the images, or pass "
                "interpolate_pos_encoding=True."
            )
        if height % self.config.patch_size or width % self.config.patch_size:
            raise ValueError(
                f"Height and width of the images must be multiples of patch_size ({self.config.patch_size}), got "
                f"{height} x {width}."
            )
        return height // self.config.patch_size, width // self.config.patch_size

    def _position_embeddings(self, grid_size: tuple[int, int]) -> torch.Tensor:
        if grid_size == self.grid_size:
            return self.position_embeddings
        of_class_token, of_patches = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        of_patches = nn.functional.interpolate(
            of_patches.unflatten(1, self.grid_size).permute(0, 3, 1, 2),
            size=grid_size,
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat([of_class_token, of_patches.flatten(2).transpose(1, 2)], dim=1)


class TNTPreTrainedModel(VisionPreTrainedModel):
    """Base class of all TNT models."""

    config: TNTConfig
    base_model_prefix = "tnt"
    _no_split_modules = ["TNTEmbeddings", "TNTLayer"]
    # Maps of the words are of (batch * patches) small sequences; only those between sentences are recorded.
    _can_record_outputs = {
        "hidden_states": TNTLayer,
        "attentions": OutputRecorder(TNTAttention, index=1, layer_name="attention"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TNTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, TNTWordEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)


def _layers(config: TNTConfig) -> nn.ModuleList:
    (rates,) = drop_path_rates(config.drop_path_rate, [config.num_hidden_layers])
    return nn.ModuleList([TNTLayer(config, rate) for rate in rates])


class TNTModel(TNTPreTrainedModel):
    """TNT without a classifier."""

    def __init__(self, config: TNTConfig):
        super().__init__(config)
        self.embeddings = TNTEmbeddings(config)
        self.layers = _layers(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            interpolate_pos_encoding: take images of another size than `config.image_size`, by bicubic interpolation of
                the position embeddings; height and width must be multiples of `patch_size`.

        Returns:
            `last_hidden_state` `(batch, 1 + patches, hidden_size)`, the class token first, normalised; `pooler_output`
            `(batch, hidden_size)`, what is classified; `hidden_states`, on request, the tokens before and after each
            block, not normalised; `attentions` `(batch, heads, 1 + patches, 1 + patches)`, those between sentences.
        """
        hidden_states, word_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states, word_states = layer(hidden_states, word_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.pooling == "token" else hidden_states[:, 1:].mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class TNTForImageClassification(ImageClassifierMixin, TNTPreTrainedModel):
    """TNT with a linear classifier."""

    body_class = TNTModel


class TNTBackbone(BackboneMixin, TNTPreTrainedModel):
    """TNT as a backbone: feature maps of the tokens before (`"stem"`) and after (`"stage1"`...) each block.

    All have stride `patch_size` and are not normalised. Images of any multiple of `patch_size` are taken.
    """

    def __init__(self, config: TNTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = TNTEmbeddings(config)
        self.layers = _layers(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Feature maps `(batch, hidden_size, height / patch_size, width / patch_size)` of `config.out_features`."""
        hidden_states, word_states = self.embeddings(pixel_values, interpolate_pos_encoding=True)
        grid_size = [side // self.config.patch_size for side in pixel_values.shape[2:]]
        feature_maps = []
        for stage, layer in zip(self.stage_names, [None, *self.layers], strict=True):
            if layer is not None:
                hidden_states, word_states = layer(hidden_states, word_states, **kwargs)
            if stage in self.out_features:
                feature_map = hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid_size)
                feature_maps.append(feature_map.contiguous())
        return BackboneOutput(feature_maps=tuple(feature_maps))


__all__ = ["TNTBackbone", "TNTForImageClassification", "TNTModel", "TNTPreTrainedModel"]
