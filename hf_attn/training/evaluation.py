"""Evaluation in several processes gives the numbers of one."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size


class ExactEvaluationMixin:
    """Before `transformers.Trainer` in the bases of a class: no sample counts twice in the loss of an evaluation.

    The last batches of several processes are filled up with samples from the beginning, so that all have the same size.
    Trainer leaves their predictions out, but not their part in the mean loss of a batch.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See [`~transformers.Trainer.prediction_step`]; the loss is that of the samples that belong to the process."""
        loss, predictions, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        size = find_batch_size(inputs)
        own = self._own_samples(size)
        if loss is not None and 0 < own < size:
            loss, _, _ = super().prediction_step(model, self.first_samples(inputs, own), True, ignore_keys)
        return loss, predictions, labels

    def first_samples(self, inputs: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The batch without what follows its first samples."""
        size = find_batch_size(inputs)
        return {
            name: value[:number] if isinstance(value, (torch.Tensor, list)) and len(value) == size else value
            for name, value in inputs.items()
        }

    def _own_samples(self, size: int) -> int:
        """How many samples of the batch at hand do not repeat others."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(size, state.remainder - self.args.process_index * size)
