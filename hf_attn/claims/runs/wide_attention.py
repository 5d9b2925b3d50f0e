"""One wide layer against a deep stack with as many heads, on small ListOps with two attention types.

Shown in small if with no attention type the seeds agree that the deep model is more accurate, and the wide one has fewer parameters and
needs less CPU time; contradicted if with every type they agree that the deep one is more accurate. Latency is that of a batch of one, one thread,
without folding, which only the wide model has.
"""

from functools import cache, partial

import torch
from torch.nn import functional as F

from ...modeling.wide_attention.configuration_wide_attention import WideTransformerConfig
from ...modeling.wide_attention.listops import SYMBOLS, Difficulty, generate
from ...modeling.wide_attention.modeling_wide_attention import WideTransformerForSequenceClassification
from ..drawing import bars
from ..result import Conclusion, Figure, agreement
from ..timing import least_cpu_seconds
from ..training import batches, loss_and_accuracy, optimise, tuned


TYPES = ("softmax", "linear")
HEADS, DEPTH = 16, 4
SIDES = {"wide": 1, "deep": DEPTH}
LENGTH, BATCH_SIZE, LATENCY_LENGTH = 40, 32, 512
PARTS = {"train": 8000, "validation": 500, "test": 1500}
DIFFICULTY = Difficulty(max_depth=2, max_arguments=5, min_length=5, max_length=LENGTH)


def measure(work) -> dict:
    steps, parts = (3, {"train": 64, "validation": 16, "test": 32}) if work.miniature else (600, PARTS)
    runs = {
        kind: {
            side: tuned(work, f"{kind}-{side}", partial(run, kind, depth, steps, tuple(parts.items())))
            for side, depth in SIDES.items()
        }
        for kind in TYPES
    }
    size = {side: make_model("softmax", depth).num_parameters() for side, depth in SIDES.items()}
    return {
        "runs": runs,
        "parameters": size,
        "milliseconds": work.part("latency", latency, 3 if work.miniature else 15),
    }


def make_model(kind: str, depth: int, length: int = LENGTH) -> WideTransformerForSequenceClassification:
    return WideTransformerForSequenceClassification(
        WideTransformerConfig(
            vocab_size=len(SYMBOLS) + 1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=depth,
            num_attention_heads=HEADS // depth,
            head_dim=16,
            max_position_embeddings=length,
            attention_type=kind,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_dropout=0.0,
        )
    )


@cache
def expressions(parts: tuple[tuple[str, int], ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (0 is padding) and values of each split; no expression is in two splits."""
    drawn = list(generate(sum(count for _, count in parts), DIFFICULTY))
    ids = torch.zeros(len(drawn), LENGTH, dtype=torch.long)
    for row, (expression, _) in enumerate(drawn):
        symbols = expression.split()
        ids[row, : len(symbols)] = torch.tensor([SYMBOLS.index(symbol) + 1 for symbol in symbols])
    values = torch.tensor([value for _, value in drawn])
    names, counts = zip(*parts, strict=True)
    return dict(zip(names, zip(ids.split(counts), values.split(counts), strict=True), strict=True))


class _Masked(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=(ids > 0).long()).logits


def run(
    kind: str, depth: int, steps: int, parts: tuple[tuple[str, int], ...], seed: int, rate: float
) -> dict[str, float]:
    torch.manual_seed(seed)
    model, data = _Masked(make_model(kind, depth)), expressions(parts)
    ids, values = data["train"]
    order = batches(len(ids), BATCH_SIZE, seed)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return F.cross_entropy(model(ids[chosen]), values[chosen])

    optimise(model, loss, steps, rate)
    validation, _ = loss_and_accuracy(model, *data["validation"])
    return {"validation": validation, "accuracy": loss_and_accuracy(model, *data["test"])[1]}


@torch.no_grad()
def latency(repeats: int) -> dict[str, list[float]]:
    """Minimum CPU milliseconds of a forward pass, in turns, by attention type: wide and deep."""
    ids = torch.randint(1, len(SYMBOLS) + 1, (1, LATENCY_LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in TYPES:
        models = [make_model(kind, depth, LATENCY_LENGTH).eval() for depth in SIDES.values()]
        calls = [lambda model=model: model(ids) for model in models]
        found[kind] = [1e3 * seconds for seconds in least_cpu_seconds(calls, repeats)]
    return found


def conclude(data: dict) -> Conclusion:
    deep = f"{DEPTH} layers of {HEADS // DEPTH} heads"
    figures, orders = [], {}
    for kind, sides in data["runs"].items():
        wide, narrow = ([run["accuracy"] for run in sides[side]] for side in SIDES)
        figures.append(
            Figure.of(f"accuracy on ListOps, {kind} attention, 1 layer of {HEADS} heads", "%", wide, deep, narrow)
        )
        orders[kind] = agreement(wide, narrow)
    size = data["parameters"]
    figures.append(Figure.of("parameters", "thousand", size["wide"] / 1e3, deep, size["deep"] / 1e3))
    for kind, (wide, narrow) in data["milliseconds"].items():
        figures.append(Figure.of(f"latency, {LATENCY_LENGTH} tokens, {kind} attention", "CPU ms", wide, deep, narrow))
    faster = all(wide < narrow for wide, narrow in data["milliseconds"].values())
    words = {1: "more accurate", 0: "not clearly more or less accurate", -1: "less accurate"}
    why = "; ".join(f"with {kind} attention one wide layer is {words[order]}" for kind, order in orders.items())
    why += f"; it has {size['wide'] / size['deep']:.0%} of the parameters and is {'faster' if faster else 'not always faster'}."
    verdict = "not shown here"
    if min(orders.values()) >= 0 and size["wide"] < size["deep"] and faster:
        verdict = "shown in small"
    elif max(orders.values()) < 0:
        verdict = "contradicted here"
    return Conclusion(tuple(figures), verdict, why[0].upper() + why[1:])


def draw(data: dict, figure) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 2))
    accuracies = {
        f"{side}\n{kind}": [run["accuracy"] for run in runs]
        for kind, sides in data["runs"].items()
        for side, runs in sides.items()
    }
    bars(left, accuracies, "%", "accuracy on ListOps")
    bars(middle, {side: [size / 1e3] for side, size in data["parameters"].items()}, "thousand", "parameters")
    times = {
        f"{side}\n{kind}": [value]
        for kind, values in data["milliseconds"].items()
        for side, value in zip(SIDES, values, strict=True)
    }
    bars(right, times, "CPU ms", f"latency, {LATENCY_LENGTH} tokens")
