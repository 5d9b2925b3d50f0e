"""Training with two learning rates: small steps for the pretrained encoders, larger ones for the new layers."""

import torch
from transformers import Trainer

from hf_attn.hub import HubTrainerMixin
from hf_attn.training.evaluation import ExactEvaluationMixin


#: parts of the names of the new layers' parameters
_NEW = ("interaction.", "head.")


class TwoRatesTrainer(ExactEvaluationMixin, HubTrainerMixin, Trainer):
    """A Trainer whose `learning_rate` is that of the encoders.

    Args:
        head_learning_rate: learning rate of the layers behind the encoders.
    """

    def __init__(self, *args, head_learning_rate: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the training arguments, with the groups split in two."""
        if self.optimizer is None:
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
            own = self.model if model is None else model
            new = {parameter for name, parameter in own.named_parameters() if any(part in name for part in _NEW)}
            groups = []
            for group in optimizer.param_groups:
                for is_new, rate in ((False, group["lr"]), (True, self.head_learning_rate)):
                    parameters = [parameter for parameter in group["params"] if (parameter in new) == is_new]
                    if parameters:
                        groups.append({**group, "params": parameters, "lr": rate})
            optimizer.param_groups = groups
        return self.optimizer
