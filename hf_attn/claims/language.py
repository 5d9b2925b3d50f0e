"""Small language models of characters, on the documentation that comes with Python."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ..examples.assets import load_texts
from .training import logits_of, optimise


#: characters of ASCII; others are the last one
VOCAB_SIZE = 128
LENGTH, BATCH_SIZE = 128, 16


@cache
def characters(split: str) -> torch.Tensor:
    """Character codes `(characters,)` of the parts `train`, `validation` and `test`."""
    text = "\n\n".join(load_texts("test" if split == "test" else "train"))
    codes = torch.tensor([min(ord(character), VOCAB_SIZE - 1) for character in text])
    if split == "test":
        return codes
    held_back = len(codes) // 20
    return codes[-held_back:] if split == "validation" else codes[:-held_back]


@torch.no_grad()
def bits_a_character(model: nn.Module, split: str, length: int = LENGTH, limit: int = 64) -> float:
    """Mean over the first `limit` stretches of a part, of the predictions of all but the first character."""
    codes = characters(split)
    stretches = codes[: min(limit, len(codes) // length) * length].view(-1, length)
    loss = sum(_loss(model, part).item() * len(part) for part in stretches.split(BATCH_SIZE)) / len(stretches)
    return loss / math.log(2)


def _loss(model: nn.Module, stretches: torch.Tensor) -> torch.Tensor:
    logits = logits_of(model(stretches))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())


def train_language_model(
    make_model: Callable[[], nn.Module], steps: int, seed: int, rate: float, length: int = LENGTH
) -> tuple[nn.Module, dict]:
    """Train a causal language model.

    Returns:
        The model, and its bits a character on the validation part (`validation`) and on the test part (`test`), and its
        training loss in nats in about fifty points (`losses`).
    """
    torch.manual_seed(seed)
    model, codes = make_model(), characters("train")
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(codes) - length, (BATCH_SIZE, 1), generator=generator)
        return _loss(model, codes[starts + torch.arange(length)])

    losses = optimise(model, loss, steps, rate)
    width = max(1, steps // 50)
    thinned = [round(sum(part) / len(part), 4) for part in (losses[i : i + width] for i in range(0, steps, width))]
    scores = {split: bits_a_character(model, split, length) for split in ("validation", "test")}
    return model, {**scores, "losses": thinned}
