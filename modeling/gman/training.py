"""The recipe of the official training: batch normalisation that slows down, and a learning rate that falls in stairs."""

import torch
from transformers import TrainerCallback

from .layers import set_batch_norm_momentum


class BatchNormMomentumCallback(TrainerCallback):
    """Halves the share of a batch in the running statistics every few epochs, from 0.5 down to 0.01.

    Args:
        epochs: length of a stair.
    """

    def __init__(self, epochs: int = 5):
        self.epochs = epochs

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        stair = round(state.epoch or 0) // self.epochs
        set_batch_norm_momentum(model, max(0.01, 0.5 * 0.5**stair))


def staircase_schedule(
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    epochs: int = 5,
    factor: float = 0.7,
    min_lr: float = 1e-5,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Multiply the learning rate by `factor` every `epochs` epochs, but not below `min_lr`."""
    floor = min_lr / optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(factor ** (step // (epochs * steps_per_epoch)), min(floor, 1.0))
    )


__all__ = ["BatchNormMomentumCallback", "staircase_schedule"]
