# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""BiFormer (arXiv 2303.08810): bi-level routing attention (section 3.2).

The feature map is cut into S x S regions. Mean queries and keys of the regions decide, without gradient, which k regions
each region attends to; its tokens then attend to all tokens of those, gathered side by side:

    I_r = top-k of  mean(Q_r) . mean(K_s)  over the regions s
    O_r = softmax(Q_r [K_s]^T / sqrt(width)) [V_s],  s in I_r;   output = W (O + depthwise conv of V)

The scale is that of the whole width, not of a head. Padding is not masked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from hf_attn.architectures.image_classification import ImageClassifierMixin
from hf_attn.architectures.layers import (
    ChannelLayerNorm,
    ChannelsLastDepthwiseConv,
    DropPath,
    check_pixel_values,
    eager_attention_forward,
    make_layer_scale,
    refuse_free_size_in_export,
    scaled,
)
from hf_attn.architectures.staged_vision.modeling import (
    StagedBackboneMixin,
    StagedEncoderMixin,
    StagedModelMixin,
    VisionPreTrainedModel,
)

from .configuration_biformer import NUM_FULL_ATTENTION_HEADS, BiFormerConfig


def to_regions(hidden_states: torch.Tensor, region_size: tuple[int, int]) -> torch.Tensor:
    """Cut a map into regions: `(batch, height, width, channels)` -> `(batch * regions, tokens, channels)`, row-major."""
    batch, height, width, channels = hidden_states.shape
    rows, columns = region_size
    regions = hidden_states.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return regions.transpose(2, 3).reshape(-1, rows * columns, channels)


def from_regions(regions: torch.Tensor, region_size: tuple[int, int], map_size: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`to_regions`]: `(batch * regions, tokens, channels)` -> `(batch, height, width, channels)`."""
    (rows, columns), (height, width) = region_size, map_size
    hidden_states = regions.reshape(-1, height // rows, width // columns, rows, columns, regions.shape[-1])
    return hidden_states.transpose(2, 3).reshape(-1, height, width, regions.shape[-1])


def pad_to_multiple(hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Add zeros, right and bottom, until height and width of `(batch, height, width, channels)` are multiples of `size`."""
    height, width = hidden_states.shape[1:3]
    bottom, right = -height % size[0], -width % size[1]
    # An exported graph has a fixed padding, which is zero if the traced image needs none.
    if not torch.compiler.is_exporting() and bottom == 0 and right == 0:
        return hidden_states
    return nn.functional.pad(hidden_states, (0, 0, 0, right, 0, bottom))


class BiFormerAttention(nn.Module):
    """What both kinds of attention share: projections, LePE and the softmax attention of tokens.

    Args:
        num_heads: number of heads.
        qk_dim: width of queries and keys.
        scaling: factor of the scores.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        lepe: whether there is the depthwise convolution.
    """

    is_causal = False

    def __init__(
        self,
        config: BiFormerConfig,
        hidden_size: int,
        num_heads: int,
        qk_dim: int,
        scaling: float,
        qkv_bias: bool,
        lepe: bool,
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.scaling = scaling
        self.qkv = nn.Linear(hidden_size, 2 * qk_dim + hidden_size, bias=qkv_bias)
        self.lepe = ChannelsLastDepthwiseConv(hidden_size, config.side_dwconv) if lepe and config.side_dwconv else None
        self.proj = nn.Linear(hidden_size, hidden_size)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Softmax attention of `(batch, q_len, qk_dim)` to `(batch, kv_len, qk_dim)` and `(batch, kv_len, hidden_size)`.

        Returns:
            `(batch, q_len, hidden_size)`, and the weights `(batch, heads, q_len, kv_len)` if the implementation has them.
        """
        heads = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(self, *heads, None, scaling=self.scaling, **kwargs)
        return output.flatten(2), weights


class BiFormerRouter(nn.Module):
    """Chooses the regions that each region attends to."""

    def __init__(self, config: BiFormerConfig, stage: int):
        super().__init__()
        qk_dim = config.qk_dims[stage]
        self.topk = config.topks[stage]
        self.scaling = qk_dim**-0.5
        self.is_differentiable = config.diff_routing
        self.linear = nn.Linear(qk_dim, qk_dim) if config.param_routing else None

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score mean queries against mean keys, each `(batch, regions, qk_dim)`.

        Returns:
            Softmax over the scores of the chosen regions and their indices, by falling score, each `(batch, regions, topk)`.
        """
        if not self.is_differentiable:
            query, key = query.detach(), key.detach()
        if self.linear is not None:
            weight, bias = self.linear.weight.to(query.dtype), self.linear.bias.to(query.dtype)
            query, key = (nn.functional.linear(tensor, weight, bias) for tensor in (query, key))
        scores, index = torch.topk(query * self.scaling @ key.transpose(1, 2), self.topk, dim=-1)
        return scores.softmax(dim=-1), index


class BiFormerRoutingAttention(BiFormerAttention):
    """Bi-level routing attention of one block."""

    def __init__(self, config: BiFormerConfig, stage: int):
        qk_dim = config.qk_dims[stage]
        super().__init__(
            config,
            config.hidden_sizes[stage],
            num_heads=qk_dim // config.head_dim,
            qk_dim=qk_dim,
            scaling=qk_dim**-0.5,
            qkv_bias=True,
            lepe=True,
        )
        self.n_win = config.n_win[stage]
        self.router = BiFormerRouter(config, stage)
        self.kv_pool = self._kv_pool(config, stage) if config.kv_pool else None

    @staticmethod
    def _kv_pool(config: BiFormerConfig, stage: int) -> nn.Module:
        pools = {
            "ada_avgpool": nn.AdaptiveAvgPool2d,
            "ada_maxpool": nn.AdaptiveMaxPool2d,
            "avgpool": nn.AvgPool2d,
            "maxpool": nn.MaxPool2d,
        }
        sizes = config.kv_per_wins if config.kv_pool.startswith("ada") else config.kv_downsample_ratios
        return pools[config.kv_pool](sizes[stage])

    def region_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a region of a map, in tokens.

        Raises:
            ValueError: if the map cannot be cut into `n_win` regions along each side.
        """
        if self.config.layout == "stl_nchw":
            if min(height, width) < self.n_win:
                raise ValueError(
                    f"A feature map of {height}x{width} is smaller than n_win={self.n_win} regions along each side. Use a "
                    "larger image or a smaller n_win."
                )
        elif height % self.n_win or width % self.n_win:
            raise ValueError(
                f"A feature map of {height}x{width} cannot be divided into n_win={self.n_win} regions along each "
                "side. Use another image size, or build the model with auto_pad=True."
            )
        return height // self.n_win, width // self.n_win

    def region_means(self, hidden_states: torch.Tensor, region_size: tuple[int, int]) -> torch.Tensor:
        """`(batch, height, width, channels)` -> `(batch, regions, channels)`, in single precision at least.

        The mean of a region that is not filled by the map is taken over the positions that exist. A rounding can change the choice of regions,
        which is not continuous, hence the precision.
        """
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.config.layout != "stl_nchw":
            return to_regions(hidden_states, region_size).mean(dim=1).unflatten(0, (-1, self.n_win**2))
        refuse_free_size_in_export(
            region_size,
            "In the layout 'stl_nchw', the pooling windows depend on the image size, but an exported pooling has "
            "constant windows.",
        )
        means = nn.functional.avg_pool2d(
            hidden_states.permute(0, 3, 1, 2), region_size, ceil_mode=True, count_include_pad=False
        )
        return means.flatten(2).transpose(1, 2)

    @staticmethod
    def gather(regions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`(batch * regions, tokens, channels)` -> `(batch * regions, topk, tokens, channels)`, those of `index`."""
        batch, num_regions, topk = index.shape
        first = torch.arange(batch, device=index.device) * num_regions
        return regions.index_select(0, (index + first[:, None, None]).flatten()).unflatten(0, (-1, topk))

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(batch, height, width, hidden_size)`, normalised.

        Returns:
            The same shape, and weights `(batch * regions, heads, tokens of a region, topk * tokens of a region)` if the
            implementation has them. Their regions are those that [`BiFormerRouter`] chose, in its order.
        """
        height, width = hidden_states.shape[1:3]
        if self.config.auto_pad and self.config.layout != "stl_nchw":
            hidden_states = pad_to_multiple(hidden_states, (self.n_win, self.n_win))
        region_size = self.region_size(*hidden_states.shape[1:3])

        query, key_value = self.qkv(hidden_states).tensor_split((self.qk_dim,), dim=-1)
        key, value = key_value.tensor_split((self.qk_dim,), dim=-1)
        routing_weights, index = self.router(*(self.region_means(tensor, region_size) for tensor in (query, key)))

        query, key_value = (pad_to_multiple(tensor, region_size) for tensor in (query, key_value))
        map_size = query.shape[1:3]
        query, key_value = (to_regions(tensor, region_size) for tensor in (query, key_value))
        if self.kv_pool is not None:
            pooled = self.kv_pool(key_value.unflatten(1, region_size).permute(0, 3, 1, 2))
            key_value = pooled.flatten(2).transpose(1, 2)
        gathered = self.gather(key_value, index)
        if self.config.soft_routing:
            gathered = gathered * routing_weights.to(gathered.dtype).flatten(0, 1)[:, :, None, None]
        key, selected_value = gathered.flatten(1, 2).tensor_split((self.qk_dim,), dim=-1)
        output, weights = self.attend(query, key, selected_value, **kwargs)

        output = from_regions(output, region_size, map_size)[:, :height, :width]
        if self.lepe is not None:
            output = output + self.lepe(value)[:, :height, :width]
        return self.proj(output), weights


class BiFormerFullAttention(BiFormerAttention):
    """Attention of every token to all, with 8 heads, as in the last stage."""

    def __init__(self, config: BiFormerConfig, stage: int):
        hidden_size = config.hidden_sizes[stage]
        lepe_of_values = config.layout == "stl_nchw"
        super().__init__(
            config,
            hidden_size,
            num_heads=NUM_FULL_ATTENTION_HEADS,
            qk_dim=hidden_size,
            scaling=(hidden_size // NUM_FULL_ATTENTION_HEADS) ** -0.5,
            qkv_bias=False,
            lepe=lepe_of_values or config.topks[stage] == -2,
        )
        self.lepe_of_values = lepe_of_values

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, height, width, hidden_size)` -> the same shape, and weights `(batch, 8, tokens, tokens)` if the
        implementation has them."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        output, weights = self.attend(*(tensor.flatten(1, 2) for tensor in (query, key, value)), **kwargs)
        output = output.view_as(hidden_states)
        if self.lepe is not None:
            output = output + self.lepe(value if self.lepe_of_values else hidden_states)
        return self.proj(output), weights


class BiFormerConvMixer(nn.Module):
    """Convolutions in place of attention (`topk` 0)."""

    def __init__(self, config: BiFormerConfig, stage: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.depthwise_conv = ChannelsLastDepthwiseConv(hidden_size, kernel_size=5)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor]:
        """`(batch, height, width, hidden_size)` -> the same shape."""
        return (self.fc2(self.depthwise_conv(self.fc1(hidden_states))),)


class BiFormerMLP(nn.Module):
    def __init__(self, config: BiFormerConfig, stage: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        intermediate_size = int(config.mlp_ratios[stage] * hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.depthwise_conv = (
            ChannelsLastDepthwiseConv(intermediate_size, kernel_size=3) if config.mlp_dwconv else None
        )
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, height, width, hidden_size)` -> the same shape."""
        hidden_states = self.fc1(hidden_states)
        if self.depthwise_conv is not None:
            hidden_states = self.depthwise_conv(hidden_states)
        return self.fc2(self.activation_fn(hidden_states))


class BiFormerLayer(GradientCheckpointingLayer):
    """Position convolution, attention and MLP, each with a residual."""

    layer_scale_names = ("attention_scale", "mlp_scale")

    def __init__(self, config: BiFormerConfig, stage: int, drop_path_rate: float):
        super().__init__()
        hidden_size, topk = config.hidden_sizes[stage], config.topks[stage]
        self.pre_norm = config.pre_norm
        self.position_conv = None
        if config.before_attn_dwconv:
            self.position_conv = ChannelsLastDepthwiseConv(hidden_size, config.before_attn_dwconv)
        if topk > 0:
            self.attention = BiFormerRoutingAttention(config, stage)
        elif topk < 0:
            self.attention = BiFormerFullAttention(config, stage)
        else:
            self.attention = BiFormerConvMixer(config, stage)
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = BiFormerMLP(config, stage)
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.drop_path = DropPath(drop_path_rate)
        initial_scale = config.layer_scale_init_value
        if initial_scale is not None and initial_scale <= 0:
            initial_scale = None
        self.attention_scale = make_layer_scale(hidden_size, initial_scale)
        self.mlp_scale = make_layer_scale(hidden_size, initial_scale)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`(batch, height, width, hidden_size)` -> the same shape."""
        if self.position_conv is not None:
            hidden_states = hidden_states + self.position_conv(hidden_states)

        residual = hidden_states
        output = self.attention(self.norm1(hidden_states) if self.pre_norm else hidden_states, **kwargs)[0]
        hidden_states = residual + self.drop_path(scaled(output, self.attention_scale))
        if not self.pre_norm:
            hidden_states = self.norm1(hidden_states)

        residual = hidden_states
        output = self.mlp(self.norm2(hidden_states) if self.pre_norm else hidden_states)
        hidden_states = residual + self.drop_path(scaled(output, self.mlp_scale))
        return hidden_states if self.pre_norm else self.norm2(hidden_states)


class BiFormerEmbeddings(nn.Sequential):
    """The stem: `(batch, num_channels, height, width)` -> `(batch, hidden_sizes[0], height / 4, width / 4)`.

    Two overlapping convolutions, which round up; in the layouts `"stl"` one of disjoint patches, which drops what is left
    over on the right and at the bottom.
    """

    def __init__(self, config: BiFormerConfig):
        width = config.hidden_sizes[0]
        if config.layout == "biformer":
            layers = [
                nn.Conv2d(config.num_channels, width // 2, kernel_size=3, stride=2, padding=1),
                nn.BatchNorm2d(width // 2, eps=config.batch_norm_eps),
                nn.GELU(),
                nn.Conv2d(width // 2, width, kernel_size=3, stride=2, padding=1),
                nn.BatchNorm2d(width, eps=config.batch_norm_eps),
            ]
        else:
            layers = [
                nn.Conv2d(config.num_channels, width, kernel_size=4, stride=4),
                nn.BatchNorm2d(width, eps=config.batch_norm_eps),
            ]
        super().__init__(*layers)
        self.num_channels = config.num_channels

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixel_values(pixel_values, self.num_channels)
        return super().forward(pixel_values.to(self[0].weight.dtype))


class BiFormerStage(nn.Module):
    """Downsampling, except in the first stage, and blocks."""

    def __init__(self, config: BiFormerConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        self.downsampling = None
        if stage > 0:
            before, width = config.hidden_sizes[stage - 1], config.hidden_sizes[stage]
            if config.layout == "biformer":
                conv = nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1)
                self.downsampling = nn.Sequential(conv, nn.BatchNorm2d(width, eps=config.batch_norm_eps))
            else:
                norm = nn.BatchNorm2d(before, eps=config.batch_norm_eps)
                self.downsampling = nn.Sequential(norm, nn.Conv2d(before, width, kernel_size=2, stride=2))
        self.layers = nn.ModuleList([BiFormerLayer(config, stage, rate) for rate in drop_path_rates])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`(batch, channels, height, width)` -> half the height and width, except in the first stage."""
        if self.downsampling is not None:
            hidden_states = self.downsampling(hidden_states)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states.permute(0, 3, 1, 2)


@dataclass
class BiFormerEncoderOutput(BaseModelOutput):
    """Output of the stages; the fields are those of [`BiFormerModelOutput`]."""

    routing_indices: tuple[torch.LongTensor, ...] | None = None


@dataclass
class BiFormerModelOutput(BaseModelOutputWithPooling):
    r"""Output of [`BiFormerModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, hidden_sizes[-1], height / 32, width / 32)`): last
            feature map, normalised.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_sizes[-1])`): its mean over all positions.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): maps out of the stem and of each stage.
        attentions (`tuple(torch.FloatTensor)`, *optional*): one for each block with attention. With routing
            `(batch_size * regions, heads, tokens of a region, topk * tokens of a region)`, else
            `(batch_size, 8, tokens, tokens)`.
        routing_indices (`tuple(torch.LongTensor)`, *optional*, with `output_routing_indices=True`): the regions chosen by
            each block with routing, by falling score, of shape `(batch_size, regions, topk)`.
    """

    routing_indices: tuple[torch.LongTensor, ...] | None = None


@dataclass
class BiFormerImageClassifierOutput(ImageClassifierOutput):
    r"""Output of [`BiFormerForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`): classification or regression loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): scores before the softmax.
        hidden_states, attentions, routing_indices: as in [`BiFormerModelOutput`].
    """

    routing_indices: tuple[torch.LongTensor, ...] | None = None


class BiFormerPreTrainedModel(VisionPreTrainedModel):
    """Base of the BiFormer models."""

    config: BiFormerConfig
    base_model_prefix = "biformer"
    _no_split_modules = ["BiFormerLayer"]
    _can_record_outputs = {
        "hidden_states": BiFormerStage,
        "attentions": BiFormerAttention,
        "routing_indices": OutputRecorder(BiFormerRouter, index=1),
    }


class BiFormerEncoder(StagedEncoderMixin, BiFormerPreTrainedModel):
    """The stages."""

    stage_class = BiFormerStage
    output_class = BiFormerEncoderOutput

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.config.layout == "stl_nchw" and isinstance(module, nn.Linear):
            # These are 1x1 convolutions in the official code, which leaves convolutions as PyTorch starts them.
            module.reset_parameters()
        else:
            super()._init_weights(module)


class BiFormerModel(StagedModelMixin, BiFormerPreTrainedModel):
    """BiFormer without a classifier, for images whose feature maps can be cut into regions. The stride is 32."""

    embeddings_class = BiFormerEmbeddings
    encoder_class = BiFormerEncoder
    output_class = BiFormerModelOutput

    def final_norm(self, config: BiFormerConfig) -> nn.Module:
        return nn.BatchNorm2d(config.hidden_sizes[-1], eps=config.batch_norm_eps)


class BiFormerForImageClassification(ImageClassifierMixin, BiFormerPreTrainedModel):
    """BiFormer with a linear classifier on the mean of its last feature map."""

    body_class = BiFormerModel
    output_class = BiFormerImageClassifierOutput


class BiFormerBackbone(StagedBackboneMixin, BiFormerPreTrainedModel):
    """BiFormer as a backbone: feature maps with strides 4 (`"stem"`), 4, 8, 16 and 32 (`"stage1"`...), each normalised.

    For segmentation and detection the paper's code uses `auto_pad=True` and `n_win` 8 (512 pixels) or 16 (COCO).
    """

    embeddings_class = BiFormerEmbeddings
    encoder_class = BiFormerEncoder
    norms_name = "hidden_states_norms"

    def feature_norm(self, stage: str, channels: int) -> nn.Module:
        return ChannelLayerNorm(channels, eps=self.config.layer_norm_eps)


__all__ = [
    "BiFormerBackbone",
    "BiFormerForImageClassification",
    "BiFormerModel",
    "BiFormerPreTrainedModel",
    "BiFormerRoutingAttention",
]
