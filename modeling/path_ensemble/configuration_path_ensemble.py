# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the vision transformers seen as ensembles of paths."""

from dataclasses import field
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from hf_attn.architectures.imaging import ImagePreprocessingMixin
from hf_attn.architectures.ranges import COUNT, FACTOR, FINITE, POSITIVE
from hf_attn.architectures.variants import VariantsMixin
from hf_attn.hub import HubConfigMixin


@strict
class PathEnsembleConfig(HubConfigMixin, ImagePreprocessingMixin, VariantsMixin, ViTConfig):
    r"""Configuration of a [`PathEnsembleForImageClassification`] (arXiv 2308.06548).

    Args:
        granularity (`str`): the paths. `"layer"`: the embeddings and, for each layer, attention and MLP together, so
            `num_hidden_layers + 1`; `"branch"`: the embeddings and, for each layer, attention, then MLP, so
            `2 * num_hidden_layers + 1`.
        pruned_paths (`list[int]`): paths, counted from 0 (the embeddings), that are removed from the input of the classifier. Later layers
            still use them.
        ensemble_scale (`str`, *optional*): learned weights of the paths (EnsembleScale): `"channel"` for one of each
            channel, `"scalar"` for one of each path; none if not given. Like other scales they want no weight decay,
            which Trainer does not know.
        ensemble_scale_init_value (`float`): their initial value; with 1 the model starts as the base.
        distillation_logits_weight (`float`): weight in the loss of the divergence of the shorter paths' own predictions
            from the teacher's.
        distillation_hidden_weight (`float`): weight in the loss of their squared distance from the teacher's features.
        distillation_teacher (`str`): `"longest"` path, or the `"ensemble"`.
        distillation_students (`list[int]`, *optional*): paths that learn; all but the longest if not given.
        distillation_temperature (`float`): temperature of the divergence.
        distillation_token (`bool`): whether there is a second prefix token, as in DeiT.
        distillation_head (`bool`): whether that token has a classifier of its own, whose scores are averaged with the
            other's.
        pooling (`str`): `"token"` classifies the class token, `"mean"` the mean of the patches.
        norm_after_pooling (`bool`): whether the final norm comes after pooling.
        layer_scale_init_value (`float`, *optional*): initial scale of the branches of the layers (LayerScale); none if
            not given.

    The other arguments are those of [`~transformers.ViTConfig`].
    """

    model_type = "path_ensemble"
    # ViT's, of which the published checkpoints are; a base of another kind brings an image processor of its own.
    image_mean = image_std = (0.5, 0.5, 0.5)
    crop_ratio = None
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "paths",
        "distillation_logits_loss",
        "distillation_hidden_loss",
        "hidden_states",
        "attentions",
    ]

    #: one path pruned, the others scaled
    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pruned_paths": [0],
        "ensemble_scale": "channel",
    }
    ranges = {
        "pruned_paths": COUNT,
        "ensemble_scale_init_value": FINITE,
        "distillation_logits_weight": FACTOR,
        "distillation_hidden_weight": FACTOR,
        "distillation_students": COUNT,
        "distillation_temperature": POSITIVE,
    }

    granularity: Literal["layer", "branch"] = "layer"
    pruned_paths: list[int] | tuple[int, ...] = field(default_factory=list)
    ensemble_scale: Literal["channel", "scalar"] | None = None
    ensemble_scale_init_value: float | int = 1.0
    distillation_logits_weight: float | int = 0.0
    distillation_hidden_weight: float | int = 0.0
    distillation_teacher: Literal["longest", "ensemble"] = "longest"
    distillation_students: list[int] | tuple[int, ...] | None = None
    distillation_temperature: float | int = 1.0
    distillation_token: bool = False
    distillation_head: bool = False
    pooling: Literal["token", "mean"] = "token"
    norm_after_pooling: bool = False
    layer_scale_init_value: float | int | None = None

    @property
    def num_paths(self) -> int:
        """Number of paths, pruned ones included."""
        return (1 if self.granularity == "layer" else 2) * self.num_hidden_layers + 1

    @property
    def path_names(self) -> list[str]:
        """A name for each path: `embeddings`, then `layer 1`... or `attention 1`, `mlp 1`..."""
        layers = range(1, self.num_hidden_layers + 1)
        if self.granularity == "layer":
            return ["embeddings", *(f"layer {index}" for index in layers)]
        return ["embeddings", *(f"{branch} {index}" for index in layers for branch in ("attention", "mlp"))]

    def validate_paths(self):
        """Part of the validation that `@strict` runs."""
        for name in ("pruned_paths", "distillation_students"):
            paths = getattr(self, name) or ()
            if any(not 0 <= path < self.num_paths for path in paths):
                raise ValueError(
                    f"{name} must be between 0 and {self.num_paths - 1} (granularity {self.granularity!r}, "
                    f"{self.num_hidden_layers} layers), got {list(paths)}."
                )
            if len(set(paths)) != len(paths):
                raise ValueError(f"{name} must not repeat a path, got {list(paths)}.")
        if len(self.pruned_paths) == self.num_paths:
            raise ValueError("All paths are pruned, so the classifier would have no input. Keep at least one path.")

    def validate_distillation(self):
        """Part of the validation that `@strict` runs."""
        if self.distillation_students is not None and not self.distillation_students:
            raise ValueError("distillation_students is empty: name at least one path, or set the weights to 0.")
        if self.distillation_head and not self.distillation_token:
            raise ValueError("distillation_head needs distillation_token=True.")


__all__ = ["PathEnsembleConfig"]
