# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""A pre-norm vision transformer as an ensemble of paths (arXiv 2308.06548).

With a_i the attention and m_i the MLP branch of layer i, the output of N layers is a sum of N + 1 paths, or of 2N + 1 if
the branches are counted apart:

    x_N = x_0 + sum_i (a_i + m_i)

The input of the classifier is  y = sum_j s_j p_j,  with s_j = 0 for pruned paths and learned otherwise (EnsembleScale). The chain
x_0, x_1, ... of the inputs of the layers is always the whole sum. With all s_j = 1 this is the plain model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.deit.modeling_deit import DeiTEmbeddings, DeiTForImageClassificationWithTeacher
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer, ViTPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_attn.architectures.image_classification import check_has_classifier, linear_classifier
from hf_attn.architectures.layers import check_pixel_values, make_layer_scale, scaled
from hf_attn.checkpoints.from_base import FromBaseMixin
from hf_attn.hub import HubModelMixin

from .configuration_path_ensemble import PathEnsembleConfig
from .timm import fields_from_timm, fields_from_timm_wrapper, is_timm_model, state_from_timm


@dataclass
class PathEnsembleModelOutput(BaseModelOutputWithPooling):
    r"""Output of [`PathEnsembleModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, tokens, hidden_size)`): the ensemble `y`, after the
            final norm unless that comes after pooling.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): what is classified; of shape
            `(batch_size, 2, hidden_size)` with a distillation head.
        ensemble (`torch.FloatTensor` of shape `(batch_size, tokens, hidden_size)`): the ensemble before the final norm.
        paths (`tuple(torch.FloatTensor)`, *optional*, with `output_paths=True`): the paths, pruned ones included and not
            scaled, each of the shape of `ensemble`.
    """

    ensemble: torch.FloatTensor | None = None
    paths: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class PathEnsembleClassifierOutput(ImageClassifierOutput):
    r"""Output of [`PathEnsembleForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`): loss of the task plus the weighted losses of
            self-distillation.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): scores of the ensemble before the softmax.
        distillation_logits_loss, distillation_hidden_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): the losses of
            self-distillation, unweighted, where their weights are not 0.
        paths (`tuple(torch.FloatTensor)`, *optional*, with `output_paths=True`): as in [`PathEnsembleModelOutput`].
    """

    distillation_logits_loss: torch.FloatTensor | None = None
    distillation_hidden_loss: torch.FloatTensor | None = None
    paths: tuple[torch.FloatTensor, ...] | None = None


@dataclass(frozen=True)
class PathLogits:
    """Logits of the paths for a batch.

    Attributes:
        ensemble: `(batch, num_labels)`, of the ensemble.
        alone: `(paths, batch, num_labels)`, of single paths, not scaled.
        without: `(paths, batch, num_labels)`, of the ensemble without each path.
    """

    ensemble: torch.Tensor
    alone: torch.Tensor
    without: torch.Tensor


def path_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(logits / T))`, mean over the batch; no gradient reaches the teacher.

    Args:
        logits: `(paths, batch, num_labels)`.
        teacher_logits: `(batch, num_labels)`.
        temperature: T.

    Returns:
        `(paths,)`.
    """
    student = (logits.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=-1)


def path_distance(paths: Sequence[torch.Tensor], teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each path from the teacher over batch, tokens and channels; none reaches the teacher.

    Args:
        paths: tensors `(batch, tokens, hidden_size)`.
        teacher: of the same shape.

    Returns:
        `(paths,)`.
    """
    return torch.stack([nn.functional.mse_loss(path.float(), teacher.detach().float()) for path in paths])


class PathEnsembleLayer(ViTLayer):
    """A layer of a ViT that also returns its two branches."""

    def __init__(self, config: PathEnsembleConfig):
        super().__init__(config)
        self.attention_scale = make_layer_scale(config.hidden_size, config.layer_scale_init_value)
        self.mlp_scale = make_layer_scale(config.hidden_size, config.layer_scale_init_value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(batch, tokens, hidden_size)` -> the output, the attention branch and the MLP branch, of the same shape."""
        attention, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        attention = self.dropout(scaled(attention, self.attention_scale))
        hidden_states = attention + hidden_states
        mlp = self.mlp(self.layernorm_after(hidden_states))
        mlp = self.dropout(scaled(mlp, self.mlp_scale))
        return mlp + hidden_states, attention, mlp


class PathEnsemblePreTrainedModel(HubModelMixin, ViTPreTrainedModel):
    """Base of the path ensembles."""

    config: PathEnsembleConfig
    base_model_prefix = "vit"
    _no_split_modules = ["ViTEmbeddings", "DeiTEmbeddings", "PathEnsembleLayer"]
    _can_record_outputs = {"hidden_states": PathEnsembleLayer, "attentions": ViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeiTEmbeddings):
            # transformers initialises them with zeros, with which all patches would be treated equally.
            for parameter in (module.cls_token, module.distillation_token, module.position_embeddings):
                init.trunc_normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, PathEnsembleLayer) and module.attention_scale is not None:
            init.constant_(module.attention_scale, self.config.layer_scale_init_value)
            init.constant_(module.mlp_scale, self.config.layer_scale_init_value)
        elif isinstance(module, PathEnsembleModel) and module.ensemble_scale is not None:
            init.constant_(module.ensemble_scale, self.config.ensemble_scale_init_value)


class PathEnsembleModel(PathEnsemblePreTrainedModel):
    """A vision transformer whose output is an ensemble of its paths, without a classifier."""

    def __init__(self, config: PathEnsembleConfig):
        super().__init__(config)
        self.embeddings = DeiTEmbeddings(config) if config.distillation_token else ViTEmbeddings(config)
        self.layers = nn.ModuleList([PathEnsembleLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ensemble_scale = None
        if config.ensemble_scale is not None:
            width = config.hidden_size if config.ensemble_scale == "channel" else 1
            self.ensemble_scale = nn.Parameter(
                torch.full((config.num_paths, width), float(config.ensemble_scale_init_value))
            )
        self.post_init()

    def combine(self, paths: Iterable[torch.Tensor], without: int | None = None) -> torch.Tensor:
        """The ensemble of paths: the sum of those that are not pruned, scaled.

        Args:
            paths: all paths, each `(batch, tokens, hidden_size)`.
            without: a path to leave out besides the pruned ones.

        Returns:
            `(batch, tokens, hidden_size)`, summed in single precision at least.
        """
        total, dtype = 0.0, None
        for index, path in enumerate(paths):
            dtype = path.dtype
            if index in self.config.pruned_paths or index == without:
                continue
            path = path.to(torch.promote_types(dtype, torch.float32))
            total = total + (path if self.ensemble_scale is None else self.ensemble_scale[index] * path)
        if not isinstance(total, torch.Tensor):
            return torch.zeros_like(path)
        return total.to(dtype)

    def read_out(self, ensemble: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Final norm and pooling.

        Args:
            ensemble: `(batch, tokens, hidden_size)`.

        Returns:
            Tokens, after the norm unless that comes after pooling, and what is classified: `(batch, hidden_size)`, or
            `(batch, 2, hidden_size)` with a distillation head.
        """
        tokens = ensemble if self.config.norm_after_pooling else self.layernorm(ensemble)
        if self.config.pooling == "mean":
            pooled = tokens[:, 2 if self.config.distillation_token else 1 :].mean(dim=1)
        else:
            pooled = tokens[:, :2] if self.config.distillation_head else tokens[:, 0]
        return tokens, self.layernorm(pooled) if self.config.norm_after_pooling else pooled

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        output_paths: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PathEnsembleModelOutput:
        r"""Encode images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`, *optional*): whether to interpolate the position embeddings to another image
                size.
            attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): 0 for tokens not to attend to.
            output_paths (`bool`): whether to return the paths.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        hidden_states = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            interpolate_pos_encoding=bool(interpolate_pos_encoding),
        )
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        # The plain model, without a rounding more, where nothing is changed.
        is_plain = not self.config.pruned_paths and self.ensemble_scale is None
        paths = [hidden_states]
        for layer in self.layers:
            hidden_states, attention, mlp = layer(hidden_states, attention_mask, **kwargs)
            if output_paths or not is_plain:
                paths += [attention, mlp] if self.config.granularity == "branch" else [attention + mlp]
        ensemble = hidden_states if is_plain else self.combine(paths)
        tokens, pooled = self.read_out(ensemble)
        return PathEnsembleModelOutput(
            last_hidden_state=tokens,
            pooler_output=pooled,
            ensemble=ensemble,
            paths=tuple(paths) if output_paths else None,
        )


class PathEnsembleForImageClassification(FromBaseMixin, PathEnsemblePreTrainedModel):
    """A vision transformer whose classifier uses an ensemble of its paths.

    Made from a trained ViT or DeiT by [`~PathEnsembleForImageClassification.from_base`], it computes what that does until
    paths are pruned ([`~PathEnsembleForImageClassification.prune`]) or scaled (`ensemble_scale`).
    """

    # The loss is a mean over the images of a call for every problem type, so Trainer has to average over calls.
    accepts_loss_kwargs = False
    base_auto_class = AutoModelForImageClassification

    def __init__(self, config: PathEnsembleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = PathEnsembleModel(config)

        self.classifier = linear_classifier(config.hidden_size, config.num_labels)
        self.distillation_classifier = None
        if config.distillation_head:
            self.distillation_classifier = linear_classifier(config.hidden_size, config.num_labels)
        self.post_init()

    # --- from a base --------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: nn.Module | str | Path, dtype=None, **overrides):
        """Make a path ensemble from a trained classifier; see [`FromBaseMixin.from_base`].

        Args:
            base: a ViT or DeiT of transformers (of DeiT also the one with two heads), a plain `VisionTransformer` of timm,
                itself or as loaded by transformers; or a Hub id or a folder of one.
            dtype: dtype to load a checkpoint in; its own if not given.
            overrides: fields of [`PathEnsembleConfig`], such as `granularity`, `pruned_paths` or `ensemble_scale`.
        """
        if isinstance(base, DeiTForImageClassificationWithTeacher):
            overrides = {"distillation_head": True, **overrides}
        if is_timm_model(base):
            config = PathEnsembleConfig(**{**fields_from_timm(base), **overrides})
            return cls.from_base_state(base.state_dict(), config, type(base).__name__)
        return super().from_base(base, dtype=dtype, **overrides)

    @classmethod
    def config_from_base(cls, base_config: PreTrainedConfig, **overrides) -> PathEnsembleConfig:
        if base_config.model_type == "timm_wrapper":
            return PathEnsembleConfig(**{**fields_from_timm_wrapper(base_config), **overrides})
        if base_config.model_type not in ("vit", "deit"):
            raise ValueError(
                f"A path ensemble cannot be made from a model of type {base_config.model_type!r}. Supported are ViT, "
                "DeiT and timm's VisionTransformer, whose layers y = x + attention(norm(x)) + mlp(norm(x + "
                "attention)) define the paths."
            )
        fields = base_config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"):
            fields.pop(name, None)
        if base_config.model_type == "deit":
            with_teacher = "DeiTForImageClassificationWithTeacher" in (base_config.architectures or ())
            fields |= {"distillation_token": True, "distillation_head": with_teacher}
        return PathEnsembleConfig(**{**fields, **overrides})

    @classmethod
    def state_from_base(cls, state: dict[str, torch.Tensor], config: PathEnsembleConfig) -> dict[str, torch.Tensor]:
        if not any(name.startswith(("vit.", "deit.")) for name in state):
            return state_from_timm({name.removeprefix("timm_model."): tensor for name, tensor in state.items()})
        return {
            name.replace("deit.", "vit.", 1).replace("cls_classifier.", "classifier.", 1): tensor
            for name, tensor in state.items()
        }

    @classmethod
    def new_to_base(cls, name: str, config: PathEnsembleConfig) -> bool:
        return name == "vit.ensemble_scale"

    # --- paths --------------------------------------------------------------------------------------------------------

    def prune(self, paths: Iterable[int]) -> None:
        """Remove paths from the ensemble; later layers still use them.

        Args:
            paths: all paths to be pruned, counted from 0; an empty list brings every path back. `range(k)` drops the
                first k, after the paper's finding that short paths do not help the prediction.

        Raises:
            ValueError: if a path does not exist or if none would be left.
        """
        before = self.config.pruned_paths
        try:
            self.config.pruned_paths = list(paths)
            self.config.validate_paths()
        except ValueError:
            self.config.pruned_paths = before
            raise

    def classify(self, ensemble: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden_size)` before the final norm -> `(batch, num_labels)`."""
        return self._classify_pooled(self.vit.read_out(ensemble)[1])

    def _classify_pooled(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.distillation_classifier is None:
            return self.classifier(pooled)
        return (self.classifier(pooled[:, 0]) + self.distillation_classifier(pooled[:, 1])) / 2

    def path_logits(self, pixel_values: torch.Tensor, **kwargs) -> PathLogits:
        """Scores of the ensemble, of single paths, and of the ensemble without single paths.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
        """
        outputs = self.vit(pixel_values, output_paths=True, **kwargs)
        without = [
            self.classify(self.vit.combine(outputs.paths, without=index)) for index in range(self.config.num_paths)
        ]
        return PathLogits(
            ensemble=self.classify(outputs.ensemble),
            alone=torch.stack([self.classify(path) for path in outputs.paths]),
            without=torch.stack(without),
        )

    def _distill(
        self, paths: Sequence[torch.Tensor], ensemble: torch.Tensor, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of self-distillation whose weights are not 0, unweighted."""
        config = self.config
        students = config.distillation_students
        if students is None:
            students = range(config.num_paths - 1)
        longest = config.distillation_teacher == "longest"
        losses = {}
        if config.distillation_logits_weight:
            teacher_logits = self.classify(paths[-1]) if longest else logits
            student_logits = torch.stack([self.classify(paths[index]) for index in students])
            divergence = path_divergence(student_logits, teacher_logits, config.distillation_temperature)
            losses["distillation_logits_loss"] = divergence.mean()
        if config.distillation_hidden_weight:
            teacher = paths[-1] if longest else ensemble
            losses["distillation_hidden_loss"] = path_distance([paths[index] for index in students], teacher).mean()
        return losses

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_paths: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PathEnsembleClassifierOutput:
        r"""Classify images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): class indices, or targets in the form that
                `config.problem_type` says.
            output_paths (`bool`): whether to return the paths.
        """
        distils = labels is not None and (
            self.config.distillation_logits_weight or self.config.distillation_hidden_weight
        )
        outputs = self.vit(pixel_values, output_paths=bool(output_paths or distils), **kwargs)
        logits = self._classify_pooled(outputs.pooler_output)
        loss, losses = None, {}
        if labels is not None:
            check_has_classifier(self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if distils:
                losses = self._distill(outputs.paths, outputs.ensemble, logits)
                loss = loss + self.config.distillation_logits_weight * losses.get("distillation_logits_loss", 0.0)
                loss = loss + self.config.distillation_hidden_weight * losses.get("distillation_hidden_loss", 0.0)
        return PathEnsembleClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            paths=outputs.paths if output_paths else None,
            **losses,
        )


__all__ = [
    "PathEnsembleForImageClassification",
    "PathEnsembleModel",
    "PathEnsemblePreTrainedModel",
    "PathLogits",
    "path_distance",
    "path_divergence",
]
