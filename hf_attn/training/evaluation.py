"""Evaluation in several processes gives the numbers of one."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.trainer_pt_utils import find_batch_size


class ExactEvaluationMixin:
    """Before `transformers.Trainer` in the bases of a class: no sample counts twice in the loss of an evaluation.

    The last batches of several processes are filled up with samples from the beginning, so that all have the same size.
    Trainer leaves their predictions out, but not their part in the mean loss of a batch. It also weighs the batches of several
    processes by their numbers of labels, which it does not do with those of one process.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See [`~transformers.Trainer.prediction_step`]; the loss is that of the samples that belong to the process."""
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            loss, predictions, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.args.average_tokens_across_devices = average
        own = self._own_samples(find_batch_size(inputs))
        if loss is not None and own is not None and own > 0:
            # Without a number of items, which all processes would have to count together.
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(self.first_samples(inputs, own))).detach().mean()
        return loss, predictions, labels

    def first_samples(self, inputs: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The batch without what follows its first samples."""
        size = find_batch_size(inputs)
        return {
            name: value[:number] if isinstance(value, (torch.Tensor, list)) and len(value) == size else value
            for name, value in inputs.items()
        }

    def _own_samples(self, size: int) -> int | None:
        """How many samples of a batch that was filled up do not repeat others; none if it was not."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return min(size, state.remainder - self.args.process_index * size)
