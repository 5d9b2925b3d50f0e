"""Stability at a high learning rate: encoders of 12 layers on digits, plain and reparametrised, without LayerNorm and with it.

A run learns if it ends with an accuracy above 50 %. Shown in small if with both architectures all reparametrised runs learn, and no plain one;
contradicted if with some architecture more plain runs learn. The least entropies say how far the attention of a layer has collapsed. The
peer is the BERT of transformers.
"""

import math
from dataclasses import asdict

from ...examples.stability import ARCHITECTURES, Run, Setting, draw_runs, load_digits, train
from ..result import Conclusion, Figure


LEARNING_RATE, PEER = 1e-2, "plain BERT"
MINIATURE = Setting(steps=3, depth=2, hidden_size=16, entropy_every=2)


def measure(work) -> dict:
    runs = []
    for architecture in ARCHITECTURES:
        for seed in work.seeds:
            for reparametrised in (False, True):
                name = f"{architecture}-{'sigma-reparam' if reparametrised else 'plain'}-seed{seed}"
                runs.append(work.part(name, run, work.miniature, architecture, reparametrised, seed))
    return {"runs": runs}


def run(miniature: bool, architecture: str, reparametrised: bool, seed: int) -> dict:
    found = Run(architecture, reparametrised, LEARNING_RATE, seed)
    train(found, load_digits(), MINIATURE if miniature else Setting())
    return {name: _finite(value) if isinstance(value, list) else value for name, value in asdict(found).items()}


def _finite(values: list[float]) -> list[float | None]:
    """Round a number for JSON, which has no NaN."""
    return [round(value, 4) if math.isfinite(value) else None for value in values]


def _run(stored: dict) -> Run:
    return Run(
        **{
            name: [math.nan if item is None else item for item in value] if isinstance(value, list) else value
            for name, value in stored.items()
        }
    )


def _least_entropy(run: dict) -> float:
    """Of any layer at any time, as long as it was a number."""
    return min(entropy for entropy in run["lowest_layer"] if entropy is not None)


def conclude(data: dict) -> Conclusion:
    figures, entropies, learnt, count = [], [], {}, 0
    for architecture in ARCHITECTURES:
        sides = {
            reparametrised: [
                run
                for run in data["runs"]
                if (run["architecture"], run["reparametrised"]) == (architecture, reparametrised)
            ]
            for reparametrised in (True, False)
        }
        name = {"post_ln": "LayerNorm after each sum", "no_ln": "no LayerNorm"}[architecture]
        accuracies = {side: [100 * run["accuracy"] for run in runs] for side, runs in sides.items()}
        text = f"accuracy at a learning rate of {LEARNING_RATE}, {name}"
        figures.append(Figure.of(text, "%", accuracies[True], PEER, accuracies[False]))
        least = {side: [_least_entropy(run) for run in runs] for side, runs in sides.items()}
        text = f"least entropy of a layer's attention, {name}"
        entropies.append(Figure.of(text, "nats", least[True], PEER, least[False]))
        learnt[name] = tuple(sum(accuracy > 50 for accuracy in accuracies[side]) for side in (True, False))
        count = len(accuracies[True])
    why = "; ".join(
        f"with {name} {ours} of {count} reparametrised runs learn and {plain} plain ones"
        for name, (ours, plain) in learnt.items()
    )
    verdict = "not shown here"
    if all(found == (count, 0) for found in learnt.values()):
        verdict = "shown in small"
    elif any(plain > ours for ours, plain in learnt.values()):
        verdict = "contradicted here"
    return Conclusion((*figures, *entropies), verdict, why[0].upper() + why[1:] + ".")


def draw(data: dict, figure) -> None:
    figure.set_size_inches(8, 5)
    draw_runs([_run(run) for run in data["runs"]], figure)
