"""The shell that NiNformer and Activator share: patch embedding, blocks, mean over tokens, linear head.

Neither has a class token, position embeddings or a final norm; a family provides the blocks. A block is a
`GradientCheckpointingLayer` over tokens `(batch, tokens, hidden_size)` with a gating unit inside, a module that returns
`(output, gate)`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.hub import HubModelMixin

from ..image_classification import ImageClassifierMixin
from ..layers import check_pixel_values


@dataclass
class PatchModelOutput(BaseModelOutputWithPooling):
    r"""Output of the models without a head.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, tokens, hidden_size)`): tokens after the last block,
            in row-major order of their patches.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): mean of the tokens.
        gates (`tuple(torch.FloatTensor)`, *optional*, with `output_gates=True`): the gate of each block, of shape
            `(batch_size, tokens, width)`.
    """

    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class PatchClassifierOutput(ImageClassifierOutput):
    r"""Output of the classifiers.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`): classification or regression loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): scores before the softmax.
        gates (`tuple(torch.FloatTensor)`, *optional*, with `output_gates=True`): as in [`PatchModelOutput`].
    """

    gates: tuple[torch.FloatTensor, ...] | None = None


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches of an image, each mapped to a token, in row-major order."""

    def __init__(self, config):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def check_size(self, height: int, width: int) -> None:
        """Raise `ValueError` for images that the model cannot take."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"An image of {height}x{width} pixels cannot be divided into patches of "
                f"{self.patch_size}x{self.patch_size}. Resize or pad it so that both sides are multiples of "
                f"{self.patch_size}."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, num_channels, height, width)` -> `(batch, tokens, hidden_size)`."""
        check_pixel_values(pixel_values, self.num_channels)
        self.check_size(*pixel_values.shape[-2:])
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an activation, dropout after the activation and at the end."""

    def __init__(self, config, width: int | None = None):
        super().__init__()
        width = width or config.hidden_size
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Act on the last dimension, of size `width` (`hidden_size` if not given)."""
        hidden_states = self.dropout(self.activation_fn(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class PatchPreTrainedModel(HubModelMixin, PreTrainedModel):
    """Base of the families; they add `config`, `base_model_prefix`, `_no_split_modules` and `_can_record_outputs`."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        # The papers train from PyTorch's own initialisation.
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class PatchModelMixin:
    """Gives a family's `PreTrainedModel` the body: patches, then `num_hidden_layers` blocks."""

    embeddings_class: ClassVar[type[PatchEmbeddings]] = PatchEmbeddings
    layer_class: ClassVar[type[nn.Module]]

    def __init__(self, config):
        super().__init__(config)
        self.patch_embeddings = self.embeddings_class(config)
        self.layers = nn.ModuleList([self.layer_class(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> PatchModelOutput:
        r"""Encode images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            output_gates (`bool`, *optional*): whether to return the gates.

        Raises:
            ValueError: for images that the model cannot take, and for `output_attentions=True`.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                f"{type(self).__name__} has no attention maps. Use output_gates=True for the gates of its blocks."
            )
        hidden_states = self.patch_embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return PatchModelOutput(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))


class PatchClassifierMixin(ImageClassifierMixin):
    """Gives a family's `PreTrainedModel` the body with a linear layer on the mean of the tokens."""

    output_class = PatchClassifierOutput
