"""Small training runs in which both sides of a claim have the same data, budget and choice of learning rates."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .run import Work


#: learning rates to choose from; each side uses its best one
RATES = (1e-3, 3e-3)


def optimise(
    model: nn.Module, losses: Callable[[], torch.Tensor], steps: int, rate: float, weight_decay: float = 0.01
) -> list[float]:
    """Train with AdamW, a warm-up over a tenth of the steps and a cosine schedule; returns the loss of each step.

    Args:
        model: trained in place.
        losses: draws a batch and returns its loss.
        steps: number of steps.
        rate: highest learning rate.
        weight_decay: applied to all parameters.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    model.train()
    found = []
    for _ in range(steps):
        loss = losses()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


def tuned(
    work: Work, name: str, run: Callable[[int, float], Mapping[str, Any]], rates: Sequence[float] = RATES
) -> list[dict[str, Any]]:
    """The runs of one side, one per seed, at the learning rate that is best for the first seed.

    Args:
        work: where the runs are kept.
        name: of the side.
        run: trains with a seed and a learning rate. Its result contains `validation`, the loss by which the rate is chosen; it is
            not the test loss.
        rates: learning rates to choose from; a miniature uses the first one.
    """
    first, *others = work.seeds
    rates = rates[:1] if work.miniature else rates
    runs = {rate: work.part(f"{name}-seed{first}-rate{rate:g}", run, first, rate) for rate in rates}
    best = min(rates, key=lambda rate: runs[rate]["validation"])
    later = [work.part(f"{name}-seed{seed}-rate{best:g}", run, seed, best) for seed in others]
    return [{**result, "rate": best} for result in [runs[best], *later]]


def operations(model: nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> int:
    """Multiply-accumulates of a forward pass, counted by torch: matrix products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs, **named)
    return counter.get_total_flops() // 2


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model of transformers or of timm."""
    return output if isinstance(output, torch.Tensor) else output.logits


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield indices of batches endlessly; each sample at most once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size)[: max(1, count // size)]


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the accuracy in percent."""
    logits = torch.cat([logits_of(model(part)) for part in inputs.split(128)])
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), 100 * accuracy
