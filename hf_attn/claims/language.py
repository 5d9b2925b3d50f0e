"""Small character-level language models on Python's documentation: one mechanism against another."""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..comparison.entries import Shape, make_model
from ..examples.assets import load_texts
from .drawing import COLORS, bars
from .training import logits_of, optimise, tuned


#: ASCII characters; all others are mapped to the last id
VOCAB_SIZE = 128
LENGTH, BATCH_SIZE = 64, 16


@cache
def characters(split: str) -> torch.Tensor:
    """Character codes `(characters,)` of the parts `train`, `validation` and `test`."""
    text = "\n\n".join(load_texts("test" if split == "test" else "train"))
    codes = torch.tensor([min(ord(character), VOCAB_SIZE - 1) for character in text])
    if split == "test":
        return codes
    held_out = len(codes) // 20
    return codes[-held_out:] if split == "validation" else codes[:-held_out]


@torch.no_grad()
def bits_a_character(model: nn.Module, split: str, length: int = LENGTH, limit: int = 64) -> float:
    """Mean over the first `limit` stretches of a part, of the predictions of all but the first character."""
    codes = characters(split)
    stretches = codes[: min(limit, len(codes) // length) * length].view(-1, length)
    loss = sum(causal_loss(model, part).item() * len(part) for part in stretches.split(BATCH_SIZE)) / len(stretches)
    return loss / math.log(2)


def random_stretches(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """A batch of the training part, `(BATCH_SIZE, length)`."""
    codes = characters("train")
    starts = torch.randint(len(codes) - length, (BATCH_SIZE, 1), generator=generator)
    return codes[starts + torch.arange(length)]


def causal_loss(model: nn.Module, stretches: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of all but the first character."""
    logits = logits_of(model(stretches))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())


def train_language_model(
    make_model: Callable[[], nn.Module], steps: int, seed: int, rate: float, length: int = LENGTH
) -> tuple[nn.Module, dict]:
    """Train a causal language model.

    Returns:
        The model, its bits per character on the validation part (`validation`) and on the test part (`test`), and its
        training loss in nats at about fifty steps (`losses`).
    """
    torch.manual_seed(seed)
    model = make_model()
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        return causal_loss(model, random_stretches(generator, length))

    losses = optimise(model, loss, steps, rate)
    width = max(1, steps // 50)
    thinned = [round(sum(part) / len(part), 4) for part in (losses[i : i + width] for i in range(0, steps, width))]
    scores = {split: bits_a_character(model, split, length) for split in ("validation", "test")}
    return model, {**scores, "losses": thinned}


class LanguageContest:
    """`measure` and `draw` of a claim about language models of one shape.

    Args:
        sides: name of a model -> entry of [`hf_attn.comparison.entries.make_config`]; the paper's model comes first.
        steps: training steps of each run.
    """

    shape = Shape(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=LENGTH,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
    )

    def __init__(self, sides: Mapping[str, str], steps: int = 300):
        self.sides, self.steps = dict(sides), steps

    def measure(self, work) -> dict[str, Any]:
        """Losses of each side for each seed, and its number of parameters."""
        steps = 3 if work.miniature else self.steps
        runs = {
            name: tuned(work, f"side{index}", partial(self.run, entry, steps))
            for index, (name, entry) in enumerate(self.sides.items())
        }
        return {
            "runs": runs,
            "steps": steps,
            "parameters": {name: make_model(entry, self.shape).num_parameters() for name, entry in self.sides.items()},
        }

    def run(self, entry: str, steps: int, seed: int, rate: float) -> dict[str, Any]:
        return train_language_model(lambda: make_model(entry, self.shape), steps, seed, rate)[1]

    @staticmethod
    def draw(data: dict[str, Any], figure) -> None:
        """Curves of the training loss, and bars of the loss on held-out text."""
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for (name, runs), color in zip(data["runs"].items(), COLORS, strict=False):
            for index, run in enumerate(runs):
                left.plot(run["losses"], color=color, alpha=0.7, label=None if index else name)
        left.set_xticks([])
        left.set(xlabel="steps", title="training loss in nats")
        left.legend(fontsize=8)
        losses = {str(index + 1): test_losses(runs) for index, runs in enumerate(data["runs"].values())}
        bars(right, losses, "bits/character (lower is better)", "held-out text")
        names = [name.split(" (")[0].replace(", ", ",\n").replace(" of ", "\nof ") for name in data["runs"]]
        right.set_xticks(range(len(losses)), names, fontsize=8)


def test_losses(runs: list[dict[str, Any]]) -> list[float]:
    """Bits per character on held-out text, for each seed."""
    return [run["test"] for run in runs]
