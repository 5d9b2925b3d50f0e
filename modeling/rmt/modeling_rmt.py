# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""RMT: attention that decays with the Manhattan distance between positions (arXiv 2309.11523)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_attn.architectures.image_classification import ImageClassifierMixin, linear_classifier
from hf_attn.architectures.layers import (
    ChannelLayerNorm,
    DropPath,
    check_pixel_values,
    eager_attention_forward,
    make_layer_scale,
    scaled,
)
from hf_attn.architectures.staged_vision.modeling import (
    StagedBackboneMixin,
    StagedEncoderMixin,
    StagedModelMixin,
    VisionPreTrainedModel,
)

from .configuration_rmt import RMTConfig


class RMTPositions(NamedTuple):
    """Positional information for the blocks of a stage.

    Attributes:
        cos, sin: rotation of queries and keys, `(height, width, head_dim)`.
        masks: logarithms of the decay, added to the attention logits: of all positions `(heads, height * width,
            height * width)`, or of the axes `(heads, width, width)` and `(heads, height, height)`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    masks: tuple[torch.Tensor, ...]


class RMTRelativePositions(nn.Module):
    """Tables of a stage, computed for the size of each map.

    They have no buffers and are computed in float32 for models of any dtype: positions count up to
    `height * width`, which bfloat16 cannot.
    """

    def __init__(self, head_dim: int, num_heads: int, initial_value: float, decay_range: float, axis_decomposed: bool):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.initial_value = initial_value
        self.decay_range = decay_range
        self.axis_decomposed = axis_decomposed

    def log_decay(self, device: torch.device | None = None) -> torch.Tensor:
        """Logarithm of the decay of each head for one step, `(heads,)`."""
        exponents = self.decay_range * torch.arange(self.num_heads, dtype=torch.float32, device=device)
        return torch.log(1 - 2 ** (-self.initial_value - exponents / self.num_heads))

    def angles(self, device: torch.device | None = None) -> torch.Tensor:
        """Angle of each channel for one position, equal in pairs, `(head_dim,)`."""
        exponents = torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float32, device=device)
        return (1.0 / 10000**exponents).repeat_interleave(2)

    def axis_mask(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """Log-decay along one axis, `(heads, length, length)`."""
        places = torch.arange(length, dtype=torch.float32, device=device)
        return self.log_decay(device)[:, None, None] * (places[:, None] - places).abs()

    def full_mask(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Log-decay between all positions in row-major order, `(heads, height * width, height * width)`."""
        of_rows = self.axis_mask(height, device)[:, :, None, :, None]
        of_columns = self.axis_mask(width, device)[:, None, :, None, :]
        return (of_rows + of_columns).flatten(3, 4).flatten(1, 2)

    def forward(self, hidden_states: torch.Tensor) -> RMTPositions:
        """Tables for a map `(batch, height, width, channels)`, in its dtype."""
        height, width, device = *hidden_states.shape[1:3], hidden_states.device
        positions = torch.arange(height * width, dtype=torch.float32, device=device)
        angles = (positions[:, None] * self.angles(device)).unflatten(0, (height, width))
        if self.axis_decomposed:
            masks = self.axis_mask(width, device), self.axis_mask(height, device)
        else:
            masks = (self.full_mask(height, width, device),)
        dtype = hidden_states.dtype
        return RMTPositions(angles.cos().to(dtype), angles.sin().to(dtype), tuple(mask.to(dtype) for mask in masks))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels (0, 1), (2, 3)..."""
    quarter_turned = torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    return states * cos + quarter_turned * sin


class RMTDepthwiseConv(nn.Module):
    """Depthwise convolution of a map whose channels are last."""

    def __init__(self, hidden_size: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RMTAttention(nn.Module):
    """Manhattan self-attention (section 3.2), over all positions at once or along one axis after the other.

    The official code adds the logarithm of the decay to the attention logits; the paper multiplies the attention weights
    by the decay. The two differ by the normalisation of the rows, and this is the code's.
    """

    is_causal = False

    def __init__(self, config: RMTConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.local_enhancement = RMTDepthwiseConv(hidden_size, kernel_size=5)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, positions: RMTPositions, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, height, width, channels)` -> the same, and weights `(batch, heads, positions, positions)`."""
        value_map = self.v_proj(hidden_states)
        # (batch, height, width, heads, head_dim)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim))
            for states in (self.q_proj(hidden_states), self.k_proj(hidden_states), value_map)
        )
        cos, sin = positions.cos[:, :, None], positions.sin[:, :, None]
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        attend = self._attend_fully if len(positions.masks) == 1 else self._attend_along_axes
        output, weights = attend(query, key, value, *positions.masks, **kwargs)
        return self.o_proj(output.flatten(-2) + self.local_enhancement(value_map)), weights

    def _attend_fully(self, query, key, value, mask, **kwargs):
        grid_size = query.shape[1:3]
        output, weights = self._attend(*(states.flatten(1, 2) for states in (query, key, value)), mask, **kwargs)
        return output.unflatten(1, grid_size), weights

    def _attend_along_axes(self, query, key, value, row_mask, column_mask, **kwargs):
        value, row_weights = self._attend_along_rows(query, key, value, row_mask, **kwargs)
        transposed = (states.transpose(1, 2) for states in (query, key, value))
        output, column_weights = self._attend_along_rows(*transposed, column_mask, **kwargs)
        weights = None
        if kwargs.get("output_attentions") and row_weights is not None:
            # What both steps together make of the values: first along row p, then along column j.
            weights = torch.einsum("bjhip,bphjq->bhijpq", column_weights, row_weights).flatten(4).flatten(2, 3)
        return output.transpose(1, 2), weights

    def _attend_along_rows(self, query, key, value, mask, **kwargs):
        rows = query.shape[:2]
        output, weights = self._attend(*(states.flatten(0, 1) for states in (query, key, value)), mask, **kwargs)
        return output.unflatten(0, rows), None if weights is None else weights.unflatten(0, rows)

    def _attend(self, query, key, value, mask, **kwargs):
        """Softmax attention with an added mask: `(batch, length, heads, head_dim)`, mask `(heads, length, length)`."""
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return attention_interface(self, query, key, value, mask[None], scaling=self.scaling, **kwargs)


class RMTMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.depthwise_conv = RMTDepthwiseConv(intermediate_size, kernel_size=3)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = nn.functional.gelu(self.fc1(hidden_states))
        return self.fc2(hidden_states + self.depthwise_conv(hidden_states))


class RMTLayer(GradientCheckpointingLayer):
    layer_scale_names = ("layer_scale1", "layer_scale2")

    def __init__(self, config: RMTConfig, stage: int, drop_path_rate: float):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.position_conv = RMTDepthwiseConv(hidden_size, kernel_size=3)
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = RMTAttention(config, hidden_size, config.num_attention_heads[stage])
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = RMTMLP(hidden_size, int(hidden_size * config.mlp_ratios[stage]))
        self.drop_path = DropPath(drop_path_rate)
        initial_scale = config.layer_scale_init_value if config.layerscales[stage] else None
        self.layer_scale1 = make_layer_scale(hidden_size, initial_scale)
        self.layer_scale2 = make_layer_scale(hidden_size, initial_scale)

    def forward(
        self, hidden_states: torch.Tensor, positions: RMTPositions, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(batch, height, width, channels)` -> the same."""
        hidden_states = hidden_states + self.position_conv(hidden_states)
        branch, _ = self.attention(self.norm1(hidden_states), positions, **kwargs)
        hidden_states = hidden_states + self.drop_path(scaled(branch, self.layer_scale1))
        branch = self.mlp(self.norm2(hidden_states))
        return hidden_states + self.drop_path(scaled(branch, self.layer_scale2))


class RMTConvNorm(nn.Module):
    """3x3 convolution and BatchNorm of a map whose channels come first."""

    def __init__(self, config: RMTConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(out_channels, eps=config.batch_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(hidden_states))


class RMTStage(nn.Module):
    def __init__(self, config: RMTConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        hidden_size, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        self.downsampling = None
        if stage > 0:
            self.downsampling = RMTConvNorm(config, config.hidden_sizes[stage - 1], hidden_size, stride=2)
        self.relative_positions = RMTRelativePositions(
            hidden_size // num_heads,
            num_heads,
            config.decay_initial_values[stage],
            config.decay_ranges[stage],
            config.axis_decomposed[stage],
        )
        self.layers = nn.ModuleList([RMTLayer(config, stage, rate) for rate in drop_path_rates])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`(batch, channels, height, width)`, halved by all stages but the first."""
        if self.downsampling is not None:
            hidden_states = self.downsampling(hidden_states)
        hidden_states = hidden_states.permute(0, 2, 3, 1).contiguous()
        positions = self.relative_positions(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, **kwargs)
        return hidden_states.permute(0, 3, 1, 2)


class RMTEmbeddings(nn.Module):
    """Patch embedding by four convolutions: `(batch, 3, height, width)` -> `(batch, channels, height / 4, width / 4)`."""

    def __init__(self, config: RMTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        hidden_size = config.hidden_sizes[0]
        self.layers = nn.ModuleList(
            [
                RMTConvNorm(config, config.num_channels, hidden_size // 2, stride=2),
                RMTConvNorm(config, hidden_size // 2, hidden_size // 2, stride=1),
                RMTConvNorm(config, hidden_size // 2, hidden_size, stride=2),
                RMTConvNorm(config, hidden_size, hidden_size, stride=1),
            ]
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixel_values(pixel_values, self.num_channels)
        hidden_states = self.layers[0](pixel_values.to(self.layers[0].conv.weight.dtype))
        for layer in self.layers[1:]:
            hidden_states = layer(nn.functional.gelu(hidden_states))
        return hidden_states


class RMTPreTrainedModel(VisionPreTrainedModel):
    """Base class of all RMT models."""

    config: RMTConfig
    base_model_prefix = "rmt"
    _no_split_modules = ["RMTLayer"]
    # The decay is a float mask with values of its own for each head, which FlashAttention does not take.
    _can_record_outputs = {"hidden_states": RMTStage, "attentions": RMTAttention}


class RMTEncoder(StagedEncoderMixin, RMTPreTrainedModel):
    stage_class = RMTStage


class RMTModel(StagedModelMixin, RMTPreTrainedModel):
    """RMT without a classifier, for images of any size.

    The stride is 32. The `attentions` of a block are `(batch, heads, positions, positions)`, in stages with
    `axis_decomposed` the product of the attention along both axes.
    """

    embeddings_class = RMTEmbeddings
    encoder_class = RMTEncoder


class RMTHead(nn.Module):
    """Projects every position, then takes the mean: `(batch, channels, height, width)` -> `(batch, projection_dim)`."""

    def __init__(self, config: RMTConfig):
        super().__init__()
        self.projection = nn.Linear(config.hidden_sizes[-1], config.projection_dim)
        self.norm = nn.BatchNorm2d(config.projection_dim, eps=config.batch_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.projection(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.silu(self.norm(projected)).mean((2, 3))


@dataclass
class RMTImageClassifierOutput(ModelOutput):
    """Output of [`RMTForImageClassification`].

    Args:
        loss: `()`, given `labels`.
        logits: `(batch, num_labels)`; of a model with `token_labeling` in evaluation those of both classifiers together.
        class_logits: `(batch, num_labels)`, of only the classifier of images, with `token_labeling`.
        token_logits: `(batch, positions, num_labels)`, of the classifier of positions, with `token_labeling`.
        hidden_states, attentions: see [`RMTModel.forward`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    class_logits: torch.FloatTensor | None = None
    token_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class RMTForImageClassification(ImageClassifierMixin, RMTPreTrainedModel):
    """RMT with a classifier, and with `config.token_labeling` another one on each position.

    In evaluation the largest score over all positions then counts half. In training the label of an image is that of each
    position, and their loss counts half; for soft targets see [`~hf_attn.modeling.rmt.token_labeling`].
    """

    body_class = RMTModel
    output_class = RMTImageClassifierOutput

    def add_classifiers(self, config: RMTConfig) -> None:
        self.head = RMTHead(config)
        self.classifier = linear_classifier(config.projection_dim, config.num_labels)
        self.token_classifier = None
        if config.token_labeling:
            self.token_classifier = linear_classifier(config.hidden_sizes[-1], config.num_labels)

    def classify(self, outputs):
        logits = self.classifier(self.head(outputs.last_hidden_state))
        if self.token_classifier is None or not self.num_labels:
            return {"logits": logits}
        token_logits = self.token_classifier(outputs.last_hidden_state.flatten(2).transpose(1, 2))
        both = logits if self.training else logits + 0.5 * token_logits.amax(dim=1)
        return {"logits": both, "class_logits": logits, "token_logits": token_logits}

    def classification_loss(self, labels, logits, class_logits=None, token_logits=None):
        loss = super().classification_loss(labels, logits)
        if token_logits is not None and self.training:
            token_labels = labels.repeat_interleave(token_logits.shape[1], dim=0)
            loss = loss + 0.5 * super().classification_loss(token_labels, token_logits.flatten(0, 1))
        return loss


class RMTBackbone(StagedBackboneMixin, RMTPreTrainedModel):
    """RMT as a backbone: feature maps with strides 4 (`"stem"`), 4, 8, 16 and 32 (`"stage1"`...).

    Those of the stages are normalised over their channels, each by a LayerNorm of its own.
    """

    embeddings_class = RMTEmbeddings
    encoder_class = RMTEncoder

    def feature_norm(self, stage: str, channels: int) -> nn.Module | None:
        return None if stage == "stem" else ChannelLayerNorm(channels)


__all__ = [
    "RMTAttention",
    "RMTBackbone",
    "RMTForImageClassification",
    "RMTImageClassifierOutput",
    "RMTModel",
    "RMTPreTrainedModel",
    "RMTRelativePositions",
]
