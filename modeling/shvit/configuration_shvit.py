# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of SHViT."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import SIZE
from hf_attn.architectures.staged_vision.configuration import StagedVisionConfig


@strict
class SHViTConfig(StagedVisionConfig):
    r"""Configuration of a [`SHViTForImageClassification`]; the defaults are SHViT-S1.

    Args:
        image_size (`int`): side of the images that the model is evaluated on; the model itself takes any size.
        num_channels (`int`): channels of the images.
        hidden_sizes (`list[int]`): channels of each stage; the first must be a multiple of 8.
        depths (`list[int]`): number of blocks of each stage.
        partial_dims (`list[int]`): number of channels of each stage that its attention uses.
        qk_dims (`list[int]`): width of queries and keys in each stage.
        block_types (`list[str]`): `"s"` for a stage with single-head attention, `"i"` for one without.
        distillation (`bool`): a second classifier, for training with a teacher. Both are averaged in evaluation.
        fused (`bool`): the form for inference, with every BatchNorm folded into its neighbour; made by
            [`SHViTPreTrainedModel.fuse`].
        batch_norm_eps (`float`): epsilon of the BatchNorms.
        group_norm_eps (`float`): epsilon of the GroupNorm before the attention.
        initializer_range (`float`): standard deviation of the initial weights of the classifier.
        out_features (`list[str]`, *optional*): stages that a backbone returns, of `"stem"`, `"stage1"`...
        out_indices (`list[int]`, *optional*): the same by number.
    """

    model_type = "shvit"
    keys_to_ignore_at_inference = ["class_logits", "distillation_logits", "hidden_states", "attentions"]
    per_stage = ("hidden_sizes", "depths", "partial_dims", "qk_dims", "block_types")
    variants = {
        "shvit_s1": {
            "hidden_sizes": [128, 224, 320],
            "depths": [2, 4, 5],
            "partial_dims": [32, 48, 68],
            "num_labels": 1000,
        },
        "shvit_s2": {
            "hidden_sizes": [128, 308, 448],
            "depths": [2, 4, 5],
            "partial_dims": [32, 66, 96],
            "num_labels": 1000,
        },
        "shvit_s3": {
            "hidden_sizes": [192, 352, 448],
            "depths": [3, 5, 5],
            "partial_dims": [48, 75, 96],
            "num_labels": 1000,
        },
        "shvit_s4": {
            "hidden_sizes": [224, 336, 448],
            "depths": [4, 7, 6],
            "partial_dims": [48, 72, 96],
            "image_size": 256,
            "num_labels": 1000,
        },
    }

    tiny = {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 2],
        "partial_dims": [4, 8, 8],
        "qk_dims": [4, 4, 4],
    }
    ranges = {"partial_dims": SIZE, "qk_dims": SIZE}

    hidden_sizes: list[int] | tuple[int, ...] = (128, 224, 320)
    depths: list[int] | tuple[int, ...] = (2, 4, 5)
    partial_dims: list[int] | tuple[int, ...] = (32, 48, 68)
    qk_dims: list[int] | tuple[int, ...] = (16, 16, 16)
    block_types: list[Literal["s", "i"]] | tuple[Literal["s", "i"], ...] = ("i", "s", "s")
    distillation: bool = False
    fused: bool = False
    batch_norm_eps: float = 1e-5
    group_norm_eps: float = 1e-5

    def validate_architecture(self):
        """Part of the validation that `@strict` runs."""
        super().validate_architecture()
        if self.hidden_sizes[0] % 8 != 0:
            raise ValueError(f"hidden_sizes[0] must be a multiple of 8, got {self.hidden_sizes[0]}.")
        for stage, (partial_dim, hidden_size) in enumerate(zip(self.partial_dims, self.hidden_sizes, strict=True)):
            if partial_dim >= hidden_size:
                raise ValueError(
                    f"partial_dims[{stage}] must be between 1 and hidden_sizes[{stage}] - 1 = {hidden_size - 1}, got "
                    f"{partial_dim}."
                )


__all__ = ["SHViTConfig"]
