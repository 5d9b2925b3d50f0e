"""The head that all image classifiers share."""

from dataclasses import fields
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple


class ImageClassifierMixin:
    """A family's base model with a classifier on its pooled output.

    With `num_labels=0` there is no classifier, and the pooled output is returned instead of logits.

    Class attributes:
        body_class: the base model; its output has a `pooler_output`.
        output_class: the output; fields that the base model's has too are passed on.
    """

    # For all problem types the loss is a mean over the images of a call, so Trainer has to average over calls.
    accepts_loss_kwargs = False
    body_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[ModelOutput]] = ImageClassifierOutput

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self._output_fields = tuple(field.name for field in fields(self.output_class))
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.add_classifiers(config)
        self.post_init()

    def add_classifiers(self, config: PreTrainedConfig) -> None:
        """Build the classifier."""
        width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
        self.classifier = linear_classifier(width, config.num_labels)

    def classify(self, outputs: ModelOutput) -> dict[str, torch.Tensor]:
        """Fields of the output, `logits` at least, from the base model's output."""
        return {"logits": self.classifier(outputs.pooler_output)}

    def classification_loss(
        self, labels: torch.Tensor, logits: torch.Tensor, **parts: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss of what [`classify`] returned."""
        return self.loss_function(labels, logits, self.config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""Classify images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): class indices, or targets in the form that
                `config.problem_type` says.
            kwargs: arguments of the base model.
        """
        outputs = self.base_model(pixel_values, **kwargs)
        parts = self.classify(outputs)
        loss = None
        if labels is not None:
            check_has_classifier(self.num_labels)
            loss = self.classification_loss(labels, **parts)
        passed_on = {name: getattr(outputs, name, None) for name in self._output_fields}
        return self.output_class(**{**passed_on, **parts, "loss": loss})


def linear_classifier(width: int, num_labels: int) -> nn.Module:
    """A linear layer from `(..., width)` to the scores of the labels; nothing if there are none."""
    return nn.Linear(width, num_labels) if num_labels else nn.Identity()


def check_has_classifier(num_labels: int) -> None:
    """Raise `ValueError` if there is no classifier, and so no loss of labels."""
    if not num_labels:
        raise ValueError("This model has no classifier (num_labels=0), so it cannot compute a loss from labels.")
