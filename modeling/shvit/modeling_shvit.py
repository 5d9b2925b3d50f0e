# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""SHViT: convolutions everywhere, and one attention head on a part of the channels (arXiv 2401.16456)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_attn.architectures.image_classification import ImageClassifierMixin
from hf_attn.architectures.layers import check_pixel_values, eager_attention_forward, squeeze_excitation
from hf_attn.architectures.staged_vision.modeling import (
    StagedBackboneMixin,
    StagedEncoderMixin,
    StagedModelMixin,
    VisionPreTrainedModel,
)

from .configuration_shvit import SHViTConfig


_NO_ADAPTERS = (
    "A fused SHViT does not support adapters, because the BatchNorms that would scale their output have been folded. "
    "Load the adapter into the model before `fuse()`, merge it, and fuse the result."
)


def _check_foldable(layer: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(layer, kind):
        raise ValueError(
            f"Cannot fold a BatchNorm into {type(layer).__name__}. Merge or unload adapters before `fuse()`."
        )


def _set_weights(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)


def _relu(hidden_states: torch.Tensor, fused: bool) -> torch.Tensor:
    """ReLU of a tensor with no other consumer; in place only in inference, because module backward hooks do not support it."""
    return hidden_states.relu_() if fused else hidden_states.relu()


def _batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map `(scale, shift)` that a BatchNorm is in evaluation, in double precision."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


class SHViTBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose weight starts at `initial_weight`; 0 lets a residual branch that ends in it start as nothing."""

    def __init__(self, num_features: int, eps: float, initial_weight: float):
        super().__init__(num_features, eps=eps)
        self.initial_weight = initial_weight


class SHViTPositionwiseConv(nn.Conv2d):
    """A 1x1 convolution, for inference, as one matrix product over all positions; channels should be last in memory."""

    def __init__(self, in_channels: int, out_channels: int, *adapter_arguments, **adapter_keywords):
        if adapter_arguments or adapter_keywords:
            # PEFT builds the layers of an adapter from the class of the layer that it adapts.
            raise ValueError(_NO_ADAPTERS)
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        output = torch.addmm(self.bias, hidden_states.flatten(0, 2), self.weight.flatten(1).T)
        return output.unflatten(0, hidden_states.shape[:3]).permute(0, 3, 1, 2)


class SHViTConvNorm(nn.Module):
    """Convolution without bias and BatchNorm, or, once fused, the one linear map that both amount to."""

    def __init__(
        self,
        config: SHViTConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_weight: float = 1.0,
    ):
        super().__init__()
        self.fused = config.fused
        if config.fused and kernel_size == 1:
            self.conv = SHViTPositionwiseConv(in_channels, out_channels)
        else:
            self.conv = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=config.fused
            )
        self.norm = nn.Identity()
        if not config.fused:
            self.norm = SHViTBatchNorm(out_channels, config.batch_norm_eps, initial_weight=norm_weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fused and not isinstance(self.conv, nn.Conv2d):
            raise ValueError(_NO_ADAPTERS)
        hidden_states = self.conv(hidden_states)
        return hidden_states if self.fused else self.norm(hidden_states)

    def fused_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the fused convolution, in double precision."""
        _check_foldable(self.conv, nn.Conv2d)
        scale, shift = _batch_norm_affine(self.norm)
        return self.conv.weight.double() * scale[:, None, None, None], shift

    def fuse(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Replace the module's layers by one convolution with this weight and bias."""
        dtype = self.conv.weight.dtype
        if self.conv.kernel_size == (1, 1):
            self.conv = SHViTPositionwiseConv(self.conv.in_channels, self.conv.out_channels)
        _set_weights(self.conv, weight.to(dtype), bias.to(dtype))
        self.norm = nn.Identity()
        self.fused = True


class SHViTLocalMixing(SHViTConvNorm):
    """Depthwise 3x3 convolution with a residual connection, which fusing absorbs into the kernel."""

    def __init__(self, config: SHViTConfig, hidden_size: int, norm_weight: float):
        super().__init__(config, hidden_size, hidden_size, kernel_size=3, groups=hidden_size, norm_weight=norm_weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mixed = super().forward(hidden_states)
        return mixed if self.fused else hidden_states + mixed

    def fused_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = super().fused_weights()
        weight[:, :, 1, 1] += 1
        return weight, bias


class SHViTMLP(nn.Module):
    def __init__(self, config: SHViTConfig, hidden_size: int):
        super().__init__()
        self.fc1 = SHViTConvNorm(config, hidden_size, 2 * hidden_size)
        self.fc2 = SHViTConvNorm(config, 2 * hidden_size, hidden_size, norm_weight=0.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(_relu(self.fc1(hidden_states), self.fc1.fused))


class SHViTAttention(nn.Module):
    """Single-head self-attention on the first `partial_dim` channels (section 3.2); the others pass by unchanged.

    The projection mixes both parts, after a ReLU over their concatenation.
    """

    is_causal = False

    def __init__(self, config: SHViTConfig, hidden_size: int, partial_dim: int, qk_dim: int):
        super().__init__()
        self.config = config
        self.scaling = qk_dim**-0.5
        self.partial_sizes = [partial_dim, hidden_size - partial_dim]
        self.qkv_sizes = [qk_dim, qk_dim, partial_dim]
        self.norm = nn.GroupNorm(1, partial_dim, eps=config.group_norm_eps)
        self.qkv = SHViTConvNorm(config, partial_dim, sum(self.qkv_sizes))
        self.proj = SHViTConvNorm(config, hidden_size, hidden_size, norm_weight=0.0)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, hidden_size, height, width)` -> the same, and weights `(batch, 1, positions, positions)`."""
        attended, untouched = hidden_states.split(self.partial_sizes, dim=1)
        # Split before the transposition: torch's BatchNorm computes wrong gradients in evaluation, for a batch of one, from
        # a gradient whose channels are last in memory.
        qkv = self.qkv(self.norm(attended)).flatten(2).split(self.qkv_sizes, dim=1)
        query, key, value = (states.transpose(1, 2).unsqueeze(1) for states in qkv)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(self, query, key, value, None, scaling=self.scaling, **kwargs)
        output = output.squeeze(2).transpose(1, 2).reshape(attended.shape)
        return self.proj(torch.cat([output, untouched], dim=1).relu_()), weights


class SHViTLayer(GradientCheckpointingLayer):
    def __init__(self, config: SHViTConfig, stage: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.local_mixing = SHViTLocalMixing(config, hidden_size, norm_weight=0.0)
        self.attention = None
        if config.block_types[stage] == "s":
            self.attention = SHViTAttention(config, hidden_size, config.partial_dims[stage], config.qk_dims[stage])
        self.mlp = SHViTMLP(config, hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = self.local_mixing(hidden_states)
        if self.attention is not None:
            attention_output, _ = self.attention(hidden_states, **kwargs)
            hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(hidden_states)


class SHViTSqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the spatial means of all."""

    def __init__(self, hidden_size: int):
        super().__init__()
        # a quarter of the channels, rounded to a multiple of 8
        squeezed_size = max(8, (hidden_size // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(hidden_size, squeezed_size, kernel_size=1)
        self.fc2 = nn.Conv2d(squeezed_size, hidden_size, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return squeeze_excitation(hidden_states, hidden_states.mean((2, 3), keepdim=True), self.fc1, self.fc2)


class SHViTPatchMerging(nn.Module):
    """Halves height and width, rounding up."""

    def __init__(self, config: SHViTConfig, in_channels: int, out_channels: int):
        super().__init__()
        hidden_size = 4 * in_channels
        self.conv1 = SHViTConvNorm(config, in_channels, hidden_size)
        self.conv2 = SHViTConvNorm(config, hidden_size, hidden_size, kernel_size=3, stride=2, groups=hidden_size)
        self.squeeze_excitation = SHViTSqueezeExcitation(hidden_size)
        self.conv3 = SHViTConvNorm(config, hidden_size, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = _relu(self.conv1(hidden_states), self.conv1.fused)
        hidden_states = _relu(self.conv2(hidden_states), self.conv2.fused)
        return self.conv3(self.squeeze_excitation(hidden_states))


class SHViTDownsampling(nn.Module):
    """From one stage to the next: patch merging between two blocks without attention."""

    def __init__(self, config: SHViTConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.local_mixing_before = SHViTLocalMixing(config, in_channels, norm_weight=1.0)
        self.mlp_before = SHViTMLP(config, in_channels)
        self.patch_merging = SHViTPatchMerging(config, in_channels, out_channels)
        self.local_mixing_after = SHViTLocalMixing(config, out_channels, norm_weight=1.0)
        self.mlp_after = SHViTMLP(config, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.local_mixing_before(hidden_states)
        hidden_states = hidden_states + self.mlp_before(hidden_states)
        hidden_states = self.patch_merging(hidden_states)
        hidden_states = self.local_mixing_after(hidden_states)
        return hidden_states + self.mlp_after(hidden_states)


class SHViTStage(nn.Module):
    def __init__(self, config: SHViTConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        self.downsampling = None
        if stage > 0:
            self.downsampling = SHViTDownsampling(config, *config.hidden_sizes[stage - 1 : stage + 1])
        self.layers = nn.ModuleList([SHViTLayer(config, stage) for _ in drop_path_rates])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if self.downsampling is not None:
            hidden_states = self.downsampling(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class SHViTEmbeddings(nn.Module):
    """Patch embedding by four convolutions of stride 2 (section 3.1): `(B, 3, H, W)` -> `(B, C, H / 16, W / 16)`."""

    def __init__(self, config: SHViTConfig):
        super().__init__()
        self.config = config
        widths = [config.num_channels, *(config.hidden_sizes[0] // divisor for divisor in (8, 4, 2, 1))]
        self.layers = nn.ModuleList(
            [
                SHViTConvNorm(config, in_channels, out_channels, kernel_size=3, stride=2)
                for in_channels, out_channels in pairwise(widths)
            ]
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixel_values(pixel_values, self.config.num_channels)
        pixel_values = pixel_values.to(self.layers[0].conv.weight.dtype)
        if self.config.fused:
            # All layers keep this memory layout, in which CPUs convolve faster.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        hidden_states = self.layers[0](pixel_values)
        for layer in self.layers[1:]:
            hidden_states = layer(_relu(hidden_states, layer.fused))
        return hidden_states


class SHViTClassifier(nn.Module):
    """BatchNorm and linear layer, or, once fused, the one linear layer that both amount to."""

    def __init__(self, config: SHViTConfig):
        super().__init__()
        hidden_size = config.hidden_sizes[-1]
        self.norm = nn.Identity() if config.fused else nn.BatchNorm1d(hidden_size, eps=config.batch_norm_eps)
        self.dense = nn.Linear(hidden_size, config.num_labels)

    def forward(self, pooled_output: torch.Tensor) -> torch.Tensor:
        return self.dense(self.norm(pooled_output))

    def fused_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the fused linear layer, in double precision."""
        _check_foldable(self.dense, nn.Linear)
        scale, shift = _batch_norm_affine(self.norm)
        weight = self.dense.weight.double()
        return weight * scale, self.dense.bias.double() + weight @ shift

    def fuse(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Replace the module's layers by one linear layer with this weight and bias."""
        dtype = self.dense.weight.dtype
        _set_weights(self.dense, weight.to(dtype), bias.to(dtype))
        self.norm = nn.Identity()


class SHViTPreTrainedModel(VisionPreTrainedModel):
    """Base class of all SHViT models."""

    config: SHViTConfig
    base_model_prefix = "shvit"
    _no_split_modules = ["SHViTLayer", "SHViTDownsampling"]
    _can_record_outputs = {"hidden_states": SHViTStage, "attentions": SHViTAttention}

    #: class of the model that this one is a part of; they share their configuration
    _part_of: str | None = None

    def __init__(self, config: SHViTConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.fused:
            self.eval()

    def post_init(self):
        """See `transformers.PreTrainedModel.post_init`."""
        super().post_init()
        for part in self.children():
            if isinstance(part, SHViTPreTrainedModel):
                part._part_of = type(self).__name__

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve `attn_implementation`, by default `"eager"`.

        On CPUs torch has no fused kernel for queries narrower than values, and what `"sdpa"` falls back to is slower.
        """
        return super().get_correct_attn_implementation(requested_attention or "eager", is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SHViTBatchNorm):
            init.constant_(module.weight, module.initial_weight)

    def train(self, mode: bool = True):
        """Switch between training and evaluation.

        Raises:
            ValueError: if a fused model is to be trained: it has lost its BatchNorms.
        """
        if mode and self.config.fused:
            raise ValueError(
                "A fused SHViT is for inference only: its BatchNorms are folded into the convolutions. Train the "
                "original model and call `fuse()` afterwards."
            )
        return super().train(mode)

    @torch.no_grad()
    def fuse(self):
        """Fold every BatchNorm into its convolution or linear layer, in place: the same function, faster.

        The result saves and loads like any other model (`config.fused`), but cannot be trained. Fusing a fused model
        changes nothing.

        Returns:
            The model itself.

        Raises:
            ValueError: in training mode, where BatchNorm is another function; if adapters wrap the layers; or if this is a
                part of a model, whose other parts would keep their BatchNorms.
        """
        if self._part_of is not None:
            raise ValueError(
                f"This is a part of a {self._part_of}: fuse the whole model, or load this part alone with "
                f"`{type(self).__name__}.from_pretrained(...)`."
            )
        if self.config.fused:
            return self
        if self.training:
            raise ValueError("Only a model in evaluation mode can be fused. Call `model.eval()` first.")
        parts = [module for module in self.modules() if isinstance(module, SHViTConvNorm | SHViTClassifier)]
        # All weights first, so that the model is not changed if one layer cannot be fused.
        for part, weights in [(part, part.fused_weights()) for part in parts]:
            part.fuse(*weights)
        self.config.fused = True
        self._lay_out_weights()
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model, see `transformers.PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.fused:
            model._lay_out_weights()
        return loaded

    def _lay_out_weights(self) -> None:
        """Order the weights of a fused model in memory as the convolutions read them; files have one order only."""
        for module in self.modules():
            if isinstance(module, SHViTPositionwiseConv):
                module.weight.data = module.weight.flatten(1).T.contiguous().T[:, :, None, None]
            elif isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)


class SHViTEncoder(StagedEncoderMixin, SHViTPreTrainedModel):
    stage_class = SHViTStage


class SHViTModel(StagedModelMixin, SHViTPreTrainedModel):
    """SHViT without a classifier, for images of any size.

    The stride is 64. The `attentions` are `(batch, 1, positions, positions)`.
    """

    embeddings_class = SHViTEmbeddings
    encoder_class = SHViTEncoder


@dataclass
class SHViTImageClassifierOutput(ModelOutput):
    """Output of [`SHViTForImageClassification`].

    Args:
        loss: `()`, given `labels`.
        logits: `(batch, num_labels)`; of a model with `distillation` in evaluation the mean of both classifiers.
        class_logits: `(batch, num_labels)`, of only the first classifier, with `distillation`.
        distillation_logits: `(batch, num_labels)`, of the second classifier, with `distillation`.
        hidden_states, attentions: see [`SHViTModel.forward`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    class_logits: torch.FloatTensor | None = None
    distillation_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SHViTForImageClassification(ImageClassifierMixin, SHViTPreTrainedModel):
    """SHViT with a classifier, or two with `config.distillation`.

    With two, the loss in training is the mean of the losses of both; for a loss against a teacher use
    `distillation_logits`.
    """

    body_class = SHViTModel
    output_class = SHViTImageClassifierOutput

    def add_classifiers(self, config: SHViTConfig) -> None:
        self.classifier = SHViTClassifier(config) if config.num_labels else nn.Identity()
        self.distillation_classifier = SHViTClassifier(config) if config.num_labels and config.distillation else None

    def classify(self, outputs):
        logits = self.classifier(outputs.pooler_output)
        if self.distillation_classifier is None:
            return {"logits": logits}
        distillation_logits = self.distillation_classifier(outputs.pooler_output)
        both = logits if self.training else (logits + distillation_logits) / 2
        return {"logits": both, "class_logits": logits, "distillation_logits": distillation_logits}

    def classification_loss(self, labels, logits, class_logits=None, distillation_logits=None):
        loss = super().classification_loss(labels, logits)
        if distillation_logits is not None and self.training:
            loss = (loss + super().classification_loss(labels, distillation_logits)) / 2
        return loss


class SHViTBackbone(StagedBackboneMixin, SHViTPreTrainedModel):
    """SHViT as a backbone: feature maps with strides 16 (`"stem"`), 16, 32 and 64 (`"stage1"`...), not normalised."""

    embeddings_class = SHViTEmbeddings
    encoder_class = SHViTEncoder


__all__ = [
    "SHViTBackbone",
    "SHViTForImageClassification",
    "SHViTImageClassifierOutput",
    "SHViTModel",
    "SHViTPreTrainedModel",
]
