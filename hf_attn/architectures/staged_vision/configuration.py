# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""The part of a configuration that image families with stages have in common."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from hf_attn.hub import HubConfigMixin

from ..imaging import ImagePreprocessingMixin, PublishedClassesMixin


@strict
class StagedVisionConfig(
    HubConfigMixin, PublishedClassesMixin, ImagePreprocessingMixin, BackboneConfigMixin, PreTrainedConfig
):
    r"""Configuration of an image model whose stages a backbone can return.

    A family adds fields with one entry for each stage (`hidden_sizes`, `depths`...) and names them in `per_stage`.

    Args:
        image_size (`int`): side of the images that the model is evaluated on.
        num_channels (`int`): channels of the images.
        initializer_range (`float`): standard deviation of the initial weights.
        out_features (`list[str]`, *optional*): stages that a backbone returns, of `"stem"`, `"stage1"`...
        out_indices (`list[int]`, *optional*): the same by number.
    """

    #: fields that have one entry for each stage
    per_stage: ClassVar[tuple[str, ...]] = ()

    image_size: int = 224
    num_channels: int = 3
    initializer_range: float = 0.02

    @property
    def num_stages(self) -> int:
        """Number of stages, the stem apart."""
        return len(self.depths)

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_stages + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        lengths = {name: len(getattr(self, name)) for name in self.per_stage}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Each of {', '.join(self.per_stage)} needs one entry per stage, got {lengths} entries.")


__all__ = ["StagedVisionConfig"]
