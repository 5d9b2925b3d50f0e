"""Mixers that relax a principle of attention, in every layer (uniform) and in every second layer (hybrid).

The standard model is a Qwen2 of transformers; the others differ from it only in their mixers. The rule has three
parts:

1. in every layer each mixer except `mlp` has a higher loss on held-out text than the standard model, for every seed
   and by more than the spread;
2. in every second layer the mean loss of each of them is at most 5 % above that of the standard model;
3. `mlp`, which mixes no tokens, has the highest mean loss of the hybrids, and of the uniform models except
   `non_approximate`, as in the paper's table.

Shown in small if all three hold. Contradicted if for most of the other mixers the hybrid is not better in the mean
than the uniform model, or if `mlp` in every layer is not clearly worse than the standard model. Otherwise not shown
here.
"""

from functools import partial
from statistics import fmean

from transformers import Qwen2Config, Qwen2ForCausalLM

from ...modeling.deconstructing_attention.configuration_deconstructing_attention import DeconstructedConfig
from ...modeling.deconstructing_attention.modeling_deconstructing_attention import DeconstructedForCausalLM
from ..language import LENGTH, VOCAB_SIZE, characters, train_language_model
from ..result import Conclusion, Figure, agreement
from ..training import tuned


SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": LENGTH,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
NO_MIXING = "mlp"
MIXERS = ("taylor_joint", "static_emb_qk", "fixed_seq_qk", "rnd_emb_qk", "non_approximate")
PLACEMENTS = ("uniform", "hybrid")
#: percent by which the loss of a hybrid may be higher than that of the standard model
NEAR = 5


def measure(work) -> dict:
    steps = 2 if work.miniature else 240
    runs = {"standard": tuned(work, "standard", partial(learn, standard, steps))}
    for kind in (*MIXERS, NO_MIXING):
        for placement in PLACEMENTS:
            name = f"{kind}-{placement}"
            runs[name] = tuned(work, name, partial(learn, partial(deconstructed, kind, placement), steps))
    return {"steps": steps, "runs": runs}


def standard() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


def deconstructed(kind: str, placement: str) -> DeconstructedForCausalLM:
    config = DeconstructedConfig(**SHAPE, simple_kind=kind, placement=placement, static_length=LENGTH)
    model = DeconstructedForCausalLM(config)
    if kind == "fixed_seq_qk":
        model.model.set_static_ids(characters("train")[:LENGTH])
    return model


def learn(make_model, steps: int, seed: int, rate: float) -> dict[str, float]:
    found = train_language_model(make_model, steps, seed, rate)[1]
    return {split: found[split] for split in ("validation", "test")}


def test_losses(data: dict) -> dict[str, list[float]]:
    return {name: [run["test"] for run in runs] for name, runs in data["runs"].items()}


def conclude(data: dict) -> Conclusion:
    losses = test_losses(data)
    peer = losses.pop("standard")
    mean = {name: fmean(values) for name, values in losses.items()}
    figures = [
        Figure.of(
            f"loss on held-out text, {kind}, {placement}",
            "bits/character",
            losses[f"{kind}-{placement}"],
            "Qwen2",
            peer,
        )
        for placement in PLACEMENTS
        for kind in (*MIXERS, NO_MIXING)
    ]
    poor = [kind for kind in MIXERS if agreement(losses[f"{kind}-uniform"], peer) == 1]
    near = [kind for kind in MIXERS if mean[f"{kind}-hybrid"] <= (1 + NEAR / 100) * fmean(peer)]
    above = {
        placement: [kind for kind in MIXERS if mean[f"{kind}-{placement}"] >= mean[f"{NO_MIXING}-{placement}"]]
        for placement in PLACEMENTS
    }
    worst = not above["hybrid"] and set(above["uniform"]) <= {"non_approximate"}
    verdict = "not shown here"
    if poor == near == list(MIXERS) and worst:
        verdict = "shown in small"
    unhelpful = [kind for kind in MIXERS if mean[f"{kind}-hybrid"] >= mean[f"{kind}-uniform"]]
    if len(unhelpful) > len(MIXERS) / 2 or agreement(losses[f"{NO_MIXING}-uniform"], peer) < 1:
        verdict = "contradicted here"
    excess = {name: 100 * (value / fmean(peer) - 1) for name, value in mean.items()}
    ranges = {
        placement: " to ".join(
            f"{limit(excess[f'{kind}-{placement}'] for kind in MIXERS):+.1f}" for limit in (min, max)
        )
        for placement in PLACEMENTS
    }
    why = (
        f"After {data['steps']} steps {len(poor)} of {len(MIXERS)} mixers are clearly worse than attention in every layer ({ranges['uniform']} % "
        f"loss), and {len(near)} are within {NEAR} % of it in every second layer ({ranges['hybrid']} %); without mixing the loss differs by "
        f"{excess[f'{NO_MIXING}-uniform']:+.1f} % and {excess[f'{NO_MIXING}-hybrid']:+.1f} %."
    )
    return Conclusion(tuple(figures), verdict, why)


def draw(data: dict, figure) -> None:
    losses, axes = test_losses(data), figure.subplots()
    kinds = (*MIXERS, NO_MIXING)
    for placement, label, color in (
        ("uniform", "in every layer", "tab:red"),
        ("hybrid", "in every second layer", "tab:green"),
    ):
        values = [losses[f"{kind}-{placement}"] for kind in kinds]
        axes.plot([fmean(seeds) for seeds in values], "_", color=color, markersize=30, markeredgewidth=4, alpha=0.6)
        for index, seeds in enumerate(values):
            axes.plot([index] * len(seeds), seeds, "o", color=color, markersize=4, label=None if index else label)
    axes.axhline(fmean(losses["standard"]), color="black", linestyle="--", label="attention in every layer (Qwen2)")
    names = (
        "Taylor form\nof softmax",
        "keys from\nembeddings",
        "map of a\nfixed text",
        "map of\nrandom\nembeddings",
        "score of the\nkey only",
        "no mixing",
    )
    axes.set_xticks(range(len(kinds)), names, fontsize=8)
    axes.set(ylabel="bits/character", title="Loss on held-out text (lower is better)")
    axes.legend(fontsize=8)
