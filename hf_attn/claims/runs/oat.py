"""OAT against a random walk and an order by saliency, on generated shelves: sequence score, and delta, the paper's distance of behaviour.

The searches of the shelves follow colour and distance, so what can be learned is known. All scanpaths are random draws, several for a
search. Shown in small if OAT's have a higher sequence score and a smaller delta than those of both peers for every seed; contradicted if
the seeds agree on the opposite of both against some peer; otherwise not shown here. How alike the searches of one shelf are shows how high
a sequence score can be expected.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from ...analysis.scanpaths import ScanpathMetrics
from ...modeling.oat.baselines import random_walk, saliency_walk
from ...modeling.oat.configuration_oat import OATConfig
from ...modeling.oat.evaluation import baseline_predictions, predict_scanpaths
from ...modeling.oat.generated_scenes import SceneGenerator
from ...modeling.oat.modeling_oat import OATForScanpathPrediction
from ...modeling.oat.processing_oat import OATImageProcessor, collate_scenes
from ...modeling.oat.trials import ScanpathDataset, Trial, split_by_image
from ..drawing import bars
from ..result import Conclusion, Figure, agreement
from ..training import batches, optimise


OWN, OTHERS = "OAT", "another person"
PEERS = ("saliency order", "random walk")
SEARCHES, BATCH_SIZE, RATE = 4, 20, 1e-3


def measure(work) -> dict:
    images, steps, samples = (20, 3, 2) if work.miniature else (400, 800, 10)
    return {"runs": [work.part(f"seed{seed}", predict, images, steps, samples, seed) for seed in work.seeds]}


def predict(images: int, steps: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Train on four fifths of the shelves; way of predicting -> measures on the others."""
    trials, held_back = split_by_image(SceneGenerator().trials(images, SEARCHES, seed), (0.8, 0.2), seed)
    torch.manual_seed(seed)
    model = make_model(trials)
    processor = OATImageProcessor.from_config(model.config)
    train, test = (ScanpathDataset(part, processor, cached_images=images) for part in (trials, held_back))
    order = batches(len(train), BATCH_SIZE, seed)
    optimise(model, lambda: model(**collate_scenes([train[i] for i in next(order).tolist()])).loss, steps, RATE)

    walk = {"max_length": model.config.max_scanpath_length, "generator": np.random.default_rng(seed)}
    saliency = partial(saliency_walk, processor=processor, **walk)
    predictions = {
        OWN: predict_scanpaths(model, test, samples),
        "saliency order": baseline_predictions(held_back, saliency, samples),
        "random walk": baseline_predictions(held_back, partial(random_walk, **walk), samples),
        OTHERS: [_searches_of_others(trial, held_back) for trial in held_back],
    }
    return {name: score(held_back, scanpaths) for name, scanpaths in predictions.items()}


def make_model(trials: Sequence[Trial]) -> OATForScanpathPrediction:
    rows, columns = trials[0].grid
    return OATForScanpathPrediction(
        OATConfig(
            crop_height=24,
            crop_width=24,
            pyramid_levels=2,
            hidden_size=96,
            encoder_layers=2,
            decoder_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            dropout=0.0,
            num_rows=rows,
            num_columns=columns,
            max_scanpath_length=max(len(trial.scanpath) for trial in trials),
        )
    )


def _searches_of_others(trial: Trial, trials: Sequence[Trial]) -> list[list[int]]:
    return [other.scanpath for other in trials if other.image_id == trial.image_id and other is not trial]


def score(trials: Sequence[Trial], predictions: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """Sequence score and delta of several predictions for each trial."""
    rows = [
        (scanpath, trial.scanpath, trial.target_index)
        for trial, scanpaths in zip(trials, predictions, strict=True)
        for scanpath in scanpaths
    ]
    found = ScanpathMetrics().compute(*(list(column) for column in zip(*rows, strict=True)))
    return {name: found[name] for name in ("sequence_score", "delta")}


def _values(data: dict, name: str, measure: str) -> list[float]:
    return [run[name][measure] for run in data["runs"]]


def conclude(data: dict) -> Conclusion:
    figures, orders = [], {}
    for measure, text, sign in (
        ("sequence_score", "sequence score (1: the same order)", 1),
        ("delta", "delta (0: the same behaviour)", -1),
    ):
        own = _values(data, OWN, measure)
        for peer in PEERS:
            others = _values(data, peer, measure)
            figures.append(Figure.of(text, "", own, peer, others))
            orders.setdefault(peer, []).append(sign * agreement(own, others))
    people = _values(data, OTHERS, "sequence_score")
    figures.append(Figure.of("sequence score of another simulated search on the same shelf", "", people))
    words = {1: "better", 0: "not clearly different", -1: "worse"}
    why = "; ".join(
        f"against the {peer} OAT's sequence score is {words[order[0]]} and its delta {words[order[1]]}"
        for peer, order in orders.items()
    )
    verdict = "not shown here"
    if all(min(order) > 0 for order in orders.values()):
        verdict = "shown in small"
    elif any(max(order) < 0 for order in orders.values()):
        verdict = "contradicted here"
    return Conclusion(tuple(figures), verdict, why[0].upper() + why[1:] + ".")


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    names = {name: name.replace(" ", "\n") for name in (OWN, *PEERS)} | {OTHERS: "another\nsearch"}
    scores = {text: _values(data, name, "sequence_score") for name, text in names.items()}
    bars(left, scores, "sequence score", "same order (higher is better)")
    deltas = {names[name]: _values(data, name, "delta") for name in (OWN, *PEERS)}
    bars(right, deltas, "delta", "behaviour (lower is better)")
