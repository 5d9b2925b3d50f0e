"""Fusion of sound and words against either alone, and calibration with and without label smoothing, on synthetic recordings.

The class of a recording is the sign of a sum of two independent values, one in the sound and one in the words: an accuracy of 75 % is the
best possible with either alone. The peers are the DeiT and the BERT of transformers, of the sizes that the fusion's encoders have, with the same
label smoothing. Shown in small if for every seed the fusion is more accurate than both peers, and its calibration error (ECE) on held-out
speakers is smaller with label smoothing than without; contradicted if the seeds agree on the opposite of any of the three; otherwise
not shown here.
"""

from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, DeiTConfig, DeiTForImageClassification

from ...analysis.calibration import expected_calibration_error, reliability_bins
from ...examples.synthetic_speech import BEST_ALONE, SAMPLING_RATE, synthetic_recordings, word_tokenizer
from ...modeling.dementia_fusion.configuration_dementia_fusion import DementiaFusionConfig
from ...modeling.dementia_fusion.data import Recording, SpeechCollator, SpeechDataset, split_by_speaker
from ...modeling.dementia_fusion.modeling_dementia_fusion import DementiaFusionForClassification
from ...modeling.dementia_fusion.processing_dementia_fusion import DementiaFusionProcessor, SpeechImageFeatureExtractor
from ..drawing import bars
from ..result import Conclusion, Figure, agreement
from ..training import batches, optimise, tuned


SMOOTHING = 0.1
BATCH_SIZE, IMAGE_SIZE, BINS = 32, 64, 10
ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT, SOUND = ("input_ids", "attention_mask"), ("pixel_values",)


def text_config() -> BertConfig:
    return BertConfig(vocab_size=len(word_tokenizer()), max_position_embeddings=64, **ENCODER)


def vision_config() -> DeiTConfig:
    return DeiTConfig(image_size=IMAGE_SIZE, patch_size=16, **ENCODER)


def fusion() -> DementiaFusionForClassification:
    return DementiaFusionForClassification(
        DementiaFusionConfig(text_config=text_config(), vision_config=vision_config())
    )


#: name -> what makes the model, its inputs, label smoothing
SIDES = {
    "fusion": (fusion, (*TEXT, *SOUND), SMOOTHING),
    "words alone": (lambda: BertForSequenceClassification(text_config()), TEXT, SMOOTHING),
    "sound alone": (lambda: DeiTForImageClassification(vision_config()), SOUND, SMOOTHING),
    "fusion without label smoothing": (fusion, (*TEXT, *SOUND), 0.0),
}
OWN, *PEERS, HARD = SIDES
PEER_NAMES = {"words alone": "BERT, words alone", "sound alone": "DeiT, sound alone"}


def measure(work) -> dict:
    steps, speakers = (3, 40) if work.miniature else (200, 700)
    return {
        "runs": {
            name: tuned(work, name.replace(" ", "-"), partial(classify, *side, steps, speakers))
            for name, side in SIDES.items()
        }
    }


@cache
def recordings(speakers: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The parts `train`, `validation` and `test`, which share no speaker, as inputs of the fusion with labels."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = DementiaFusionProcessor(SpeechImageFeatureExtractor(size=size), word_tokenizer())
    all_of_them = [
        Recording({"array": one.samples, "sampling_rate": SAMPLING_RATE}, one.text, one.label, one.speaker)
        for one in synthetic_recordings(speakers, seed=seed)
    ]
    parts = zip(("train", "validation", "test"), split_by_speaker(all_of_them, (0.5, 0.1, 0.4), seed), strict=True)
    return {name: SpeechCollator(processor)(list(SpeechDataset(part, processor))) for name, part in parts}


def classify(make_model, inputs: tuple[str, ...], smoothing: float, steps: int, speakers: int, seed: int, rate: float):
    """Train; the loss without smoothing on the validation part, and accuracy, ECE and its bins on the test part."""
    parts = recordings(speakers, seed)
    torch.manual_seed(seed)
    model: nn.Module = make_model()
    order = batches(len(parts["train"]["labels"]), BATCH_SIZE, seed)

    def logits(part: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
        return model(**{name: part[name][chosen] for name in inputs}).logits

    def loss() -> torch.Tensor:
        chosen = next(order)
        labels = parts["train"]["labels"][chosen]
        return F.cross_entropy(logits(parts["train"], chosen), labels, label_smoothing=smoothing)

    optimise(model, loss, steps, rate)
    with torch.no_grad():
        found = {
            name: torch.cat(
                [logits(parts[name], chosen) for chosen in torch.arange(len(parts[name]["labels"])).split(128)]
            )
            for name in ("validation", "test")
        }
    labels, probabilities = parts["test"]["labels"].numpy(), found["test"].double().softmax(-1).numpy()
    bins = reliability_bins(probabilities, labels, BINS)
    return {
        "validation": F.cross_entropy(found["validation"], parts["validation"]["labels"]).item(),
        "accuracy": 100 * float((probabilities.argmax(-1) == labels).mean()),
        "ece": 100 * expected_calibration_error(probabilities, labels, BINS),
        "bins": [
            [int(count), float(confidence), float(accuracy)]
            for count, confidence, accuracy in zip(bins.counts, bins.confidences, bins.accuracies, strict=True)
            if count
        ],
    }


def _values(data: dict, side: str, name: str) -> list[float]:
    return [run[name] for run in data["runs"][side]]


def _excess(data: dict, side: str) -> list[float]:
    """Points by which the mean confidence exceeds the accuracy."""
    return [
        100
        * sum(count * (confidence - accuracy) for count, confidence, accuracy in run["bins"])
        / sum(count for count, *_ in run["bins"])
        for run in data["runs"][side]
    ]


def conclude(data: dict) -> Conclusion:
    accuracies = {side: _values(data, side, "accuracy") for side in (OWN, *PEERS)}
    smooth, hard = (_values(data, side, "ece") for side in (OWN, HARD))
    calibrated = agreement(hard, smooth)
    figures = [
        Figure.of("accuracy on held-out speakers", "%", accuracies[OWN], PEER_NAMES[peer], accuracies[peer])
        for peer in PEERS
    ]
    figures.append(Figure.of("calibration error (ECE) of the fusion", "%", smooth, "without label smoothing", hard))
    excess = Figure.of(
        "its mean confidence above its accuracy",
        "points",
        _excess(data, OWN),
        "without label smoothing",
        _excess(data, HARD),
    )
    figures.append(excess)
    figures.append(Figure.of("best possible accuracy with words or sound alone", "%", 100 * BEST_ALONE))
    orders = {peer: agreement(accuracies[OWN], accuracies[peer]) for peer in PEERS}
    words = {1: "higher than", 0: "not clearly different from", -1: "lower than"}
    why = "The accuracy of the fusion is " + " and ".join(
        f"{words[order]} that of {PEER_NAMES[peer]}" for peer, order in orders.items()
    )
    words = {1: "smaller than", 0: "not clearly different from", -1: "larger than"}
    why += f"; its calibration error with label smoothing is {words[calibrated]} without."
    found = (*orders.values(), calibrated)
    verdict = "not shown here"
    if min(found) > 0:
        verdict = "shown in small"
    elif min(found) < 0:
        verdict = "contradicted here"
    return Conclusion(tuple(figures), verdict, why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    sides = {side.replace(" ", "\n"): _values(data, side, "accuracy") for side in (OWN, *PEERS)}
    bars(left, sides, "accuracy in %", "held-out speakers")
    for side, color, label in ((HARD, "tab:red", "no label smoothing"), (OWN, "tab:blue", "label smoothing")):
        for index, run in enumerate(data["runs"][side]):
            _, confidences, accuracies = zip(*run["bins"], strict=True)
            style = {"color": color, "alpha": 0.6, "markersize": 3}
            right.plot(confidences, accuracies, "o-", label=None if index else label, **style)
    right.plot([0.5, 1], [0.5, 1], "--", color="black", label="calibrated")
    right.set(xlabel="confidence of the fusion", ylabel="share that is right", title="calibration")
    right.legend(fontsize=8)
