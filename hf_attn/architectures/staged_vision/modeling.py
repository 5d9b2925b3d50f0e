# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The body of image models with stages: stem, stages of blocks on ever smaller maps, and what is made of them.

A family provides its stem and its stage, and combines them with the classes of this module:

    class XEncoder(StagedEncoderMixin, XPreTrainedModel):      stage_class = XStage
    class XModel(StagedModelMixin, XPreTrainedModel):          embeddings_class, encoder_class = XEmbeddings, XEncoder
    class XBackbone(StagedBackboneMixin, XPreTrainedModel):    embeddings_class, encoder_class = XEmbeddings, XEncoder
    class XForImageClassification(ImageClassifierMixin, XPreTrainedModel):     body_class = XModel

A stage is built from `(config, index, drop_path_rates)`, with a rate for each of its blocks, and maps
`(batch, channels, height, width)` to a map of its own width; all but the first make it smaller.
"""

import math
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.hub import HubModelMixin

from ..layers import drop_path_rates
from .configuration import StagedVisionConfig


class VisionPreTrainedModel(HubModelMixin, PreTrainedModel):
    """What these families share; they add `config`, `base_model_prefix`, `_no_split_modules` and `_can_record_outputs`.

    A block with layer scales names them in its attribute `layer_scale_names`.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # PyTorch's default initialisation, as in the official codes.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        for name in getattr(module, "layer_scale_names", ()):
            if getattr(module, name) is not None:
                init.constant_(getattr(module, name), self.config.layer_scale_init_value)


class StagedEncoderMixin:
    """The stages.

    Class attributes:
        stage_class: a stage.
        output_class: the output, with a field for everything that the family records.
    """

    main_input_name = "hidden_states"
    stage_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[BaseModelOutput]] = BaseModelOutput

    def __init__(self, config: StagedVisionConfig):
        super().__init__(config)
        rates = drop_path_rates(getattr(config, "drop_path_rate", 0.0), config.depths)
        self.stages = nn.ModuleList(self.stage_class(config, stage, rates[stage]) for stage in range(len(rates)))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """Run the stages on the output of the stem, `(batch, hidden_sizes[0], height, width)`."""
        for stage in self.stages:
            hidden_states = stage(hidden_states, **kwargs)
        return self.output_class(last_hidden_state=hidden_states)


class StagedModelMixin:
    """Stem, stages and a mean over all positions.

    Class attributes:
        embeddings_class: the stem.
        encoder_class: the stages.
        output_class: the output, with the fields of the encoder's.
    """

    embeddings_class: ClassVar[type[nn.Module]]
    encoder_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[BaseModelOutputWithPooling]] = BaseModelOutputWithPooling

    def __init__(self, config: StagedVisionConfig):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = self.encoder_class(config)
        self.norm = self.final_norm(config)
        self.post_init()

    def final_norm(self, config: StagedVisionConfig) -> nn.Module:
        """Layers after the last feature map."""
        return nn.Identity()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""Encode images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images of any
                size that the family takes.

        Returns:
            `last_hidden_state` `(batch, hidden_sizes[-1], height / stride, width / stride)`, rounded up; `pooler_output`
            `(batch, hidden_sizes[-1])`, its mean over all positions; `hidden_states`, on request, the outputs of the stem
            and of each stage; `attentions` of each block that has attention.
        """
        outputs = self.encoder(self.embeddings(pixel_values), **kwargs)
        last_hidden_state = self.norm(outputs.last_hidden_state)
        pooled = last_hidden_state.mean((2, 3))
        return self.output_class(**{**outputs, "last_hidden_state": last_hidden_state, "pooler_output": pooled})


class StagedBackboneMixin(BackboneMixin):
    """Stem and stages, whose maps are returned, each through a norm of its own if the family has them.

    Class attributes:
        embeddings_class, encoder_class: as in [`StagedModelMixin`].
        norms_name: attribute that holds the norms.
    """

    embeddings_class: ClassVar[type[nn.Module]]
    encoder_class: ClassVar[type[nn.Module]]
    norms_name: ClassVar[str] = "feature_norms"

    def __init__(self, config: StagedVisionConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.embeddings = self.embeddings_class(config)
        self.encoder = self.encoder_class(config)
        stages = zip(self.out_features, self.channels, strict=True)
        norms = {stage: self.feature_norm(stage, channels) for stage, channels in stages}
        self._built_features = tuple(norms)
        setattr(self, self.norms_name, nn.ModuleDict({name: norm for name, norm in norms.items() if norm is not None}))
        self.post_init()

    def feature_norm(self, stage: str, channels: int) -> nn.Module | None:
        """The norm of a stage's map `(batch, channels, height, width)`, if it has one."""
        return None

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        r"""Compute feature maps.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.

        Returns:
            `feature_maps`, contiguous `(batch_size, channels, height / stride, width / stride)` for each of
            `out_features`.

        Raises:
            ValueError: if `out_features` has been changed to a stage whose norm the backbone was built without.
        """
        norms = getattr(self, self.norms_name)
        new = [(name, width) for name, width in self.out_feature_channels.items() if name not in self._built_features]
        missing = [name for name, width in new if name in self.out_features and self.feature_norm(name, width)]
        if missing:
            raise ValueError(
                f"This backbone was built for {list(self._built_features)} and has no norms for {missing}. Load it "
                f"with `from_pretrained(..., out_features={list(self.out_features)})`."
            )
        outputs = self.encoder(self.embeddings(pixel_values), **kwargs)
        features = dict(zip(self.stage_names, outputs.hidden_states, strict=True))
        feature_maps = [
            norms[stage](features[stage]) if stage in norms else features[stage] for stage in self.out_features
        ]
        return BackboneOutput(
            feature_maps=tuple(feature.contiguous() for feature in feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "StagedBackboneMixin",
    "StagedEncoderMixin",
    "StagedModelMixin",
    "VisionPreTrainedModel",
]
