"""DeBERTa: loss on masked characters of the whole model, and without each of its parts.

Left out in turn are the content-to-position term, the position-to-content term, and the enhanced mask decoder: then a
model has absolute positions at its input, as BERT has, or none. Models without the decoder are the DebertaV2 of
transformers; a BERT of transformers has no relative positions either. All are trained on the beginnings of paragraphs.

Shown in small if the loss of the whole model on held-out text is lower than without each part, and lower than BERT's,
for every seed and by more than the spread. Contradicted if it is higher in the same sense than without some part, or
higher than BERT's. Otherwise not shown here. The time of the attention module beside transformers' is reported and
decides nothing.
"""

import copy
import math
from functools import cache, partial
from statistics import fmean

import torch
from transformers import BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model

from ...modeling.deberta.configuration_deberta import DebertaEMDConfig
from ...modeling.deberta.modeling_deberta import DebertaEMDForMaskedLM
from ...patching.deberta import apply_fast_attention
from ..drawing import bars
from ..language import VOCAB_SIZE, characters
from ..result import Conclusion, Figure, agreement
from ..timing import least_cpu_seconds
from ..training import optimise, tuned


#: number of times that each text is evaluated, with different masks
REPEATS = 4
LENGTH, BATCH_SIZE = 64, 16
#: a character that does not occur in the texts
MASK = 1
MASKED, REPLACED, CHANGED = 0.15, 0.8, 0.1
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": None,
}
RELATIVE = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 32,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
OWN, PEER = "DeBERTa", "BERT of transformers"


def deberta(**fields) -> DebertaEMDForMaskedLM:
    return DebertaEMDForMaskedLM(DebertaEMDConfig(**SHAPE, **RELATIVE, **fields))


def no_decoder(**fields) -> DebertaV2ForMaskedLM:
    terms = {"pos_att_type": ["p2c", "c2p"], "legacy": False}
    return DebertaV2ForMaskedLM(DebertaV2Config(**SHAPE, **RELATIVE, **terms, **fields))


SIDES = {
    OWN: deberta,
    "without content to position": partial(deberta, pos_att_type="p2c"),
    "without position to content": partial(deberta, pos_att_type="c2p"),
    "without decoder, positions at the input": partial(no_decoder, position_biased_input=True),
    "without decoder, no absolute positions": partial(no_decoder, position_biased_input=False),
    PEER: lambda: BertForMaskedLM(BertConfig(**SHAPE)),
}
#: lengths at which the attention module is timed
TIMED = (128, 512)


def measure(work) -> dict:
    steps, repeats = (3, 1) if work.miniature else (500, REPEATS)
    return {
        "steps": steps,
        "runs": {
            name: tuned(work, f"side{index}", partial(learn, name, steps, repeats)) for index, name in enumerate(SIDES)
        },
        "frequencies": bits_of_frequencies(),
        "milliseconds": work.part("attention", attention_times, TIMED[:1] if work.miniature else TIMED),
    }


@cache
def paragraphs(split: str) -> torch.Tensor:
    """The first characters from the beginning of each paragraph of a split, `(paragraphs, LENGTH)`."""
    codes = characters(split)
    breaks = (codes[:-2] == ord("\n")) & (codes[1:-1] == ord("\n")) & (codes[2:] != ord("\n"))
    return codes.unfold(0, LENGTH, 1)[
        [start for start in (breaks.nonzero()[:, 0] + 2).tolist() if start <= len(codes) - LENGTH]
    ]


def masked(texts: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts masked as in BERT, and the labels, -100 where nothing is predicted."""
    chosen = torch.rand(texts.shape, generator=generator) < MASKED
    fate = torch.rand(texts.shape, generator=generator)
    others = torch.randint(VOCAB_SIZE, texts.shape, generator=generator)
    inputs = texts.masked_fill(chosen & (fate < REPLACED), MASK)
    inputs = torch.where(chosen & (fate >= 1 - CHANGED), others, inputs)
    return inputs, texts.masked_fill(~chosen, -100)


def learn(name: str, steps: int, repeats: int, seed: int, rate: float) -> dict[str, float]:
    """Bits per masked character on the validation and test splits, with the same masks for all models."""
    torch.manual_seed(seed)
    model, texts = SIDES[name](), paragraphs("train")
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        inputs, labels = masked(texts[torch.randint(len(texts), (BATCH_SIZE,), generator=generator)], generator)
        return model(input_ids=inputs, labels=labels).loss

    optimise(model, loss, steps, rate)
    return {split: bits_per_masked_character(model, split, repeats) for split in ("validation", "test")}


@torch.no_grad()
def bits_per_masked_character(model, split: str, repeats: int) -> float:
    total, count = 0.0, 0
    inputs, labels = masked(paragraphs(split).repeat(repeats, 1), torch.Generator().manual_seed(0))
    for some, wanted in zip(inputs.split(64), labels.split(64), strict=True):
        number = int((wanted != -100).sum())
        total, count = total + number * model(input_ids=some, labels=wanted).loss.item(), count + number
    return total / count / math.log(2)


def bits_of_frequencies() -> float:
    """Bits per character on the test split of a model that knows only the frequencies of characters in the training split."""
    counts = characters("train").bincount(minlength=VOCAB_SIZE) + 1.0
    return -(counts / counts.sum()).log2()[characters("test")].mean().item()


def attention_times(lengths) -> list[list[float]]:
    """Length, and minimum CPU milliseconds of an attention module of base size: of transformers, and the same one patched."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 3072}
    positions = {"position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    plain = DebertaV2Model(
        DebertaV2Config(**{**RELATIVE, "position_buckets": 256}, **sizes, **positions, vocab_size=8)
    ).eval()
    fast = copy.deepcopy(plain)
    apply_fast_attention(fast)
    return [
        [length, *(1e3 * s for s in least_cpu_seconds([partial(attend, model, length) for model in (plain, fast)], 8))]
        for length in lengths
    ]


@torch.no_grad()
def attend(model: DebertaV2Model, length: int) -> torch.Tensor:
    states = torch.zeros(1, length, model.config.hidden_size)
    encoder = model.encoder
    return encoder.layer[0].attention.self(
        states,
        encoder.get_attention_mask(torch.ones(1, length)),
        relative_pos=encoder.get_rel_pos(states),
        rel_embeddings=encoder.get_rel_embedding(),
    )[0]


def conclude(data: dict) -> Conclusion:
    losses = {name: [run["test"] for run in runs] for name, runs in data["runs"].items()}
    own = losses.pop(OWN)
    figures = [Figure.of("loss on masked characters", "bits", own, name, other) for name, other in losses.items()]
    figures.append(Figure.of("the same, by the frequencies of characters alone", "bits", data["frequencies"]))
    for length, plain, fast in data["milliseconds"]:
        figures.append(Figure.of(f"time of attention, {length} tokens", "CPU ms", fast, "transformers", plain))
    orders = {name: agreement(other, own) for name, other in losses.items()}
    words = {1: "lower than", 0: "not clearly different from", -1: "higher than"}
    counts = {text: list(orders.values()).count(order) for order, text in words.items()}
    verdict = "shown in small" if min(orders.values()) == 1 else "not shown here"
    if min(orders.values()) < 0:
        verdict = "contradicted here"
    against = ", ".join(f"{text} that of {count}" for text, count in counts.items() if count)
    why = f"After {data['steps']} steps the loss of the whole model is {against} of the {len(orders)} other models."
    return Conclusion(tuple(figures), verdict, why)


def draw(data: dict, figure) -> None:
    losses = {name: [run["test"] for run in runs] for name, runs in data["runs"].items()}
    title = f"Loss on held-out text (lower is better); BERT: {fmean(losses.pop(PEER)):.2f}"
    names = (
        "DeBERTa",
        "without content\nto position",
        "without position\nto content",
        "no decoder,\npositions at\nthe input",
        "no decoder,\nno absolute\npositions",
    )
    bars(figure.subplots(), dict(zip(names, losses.values(), strict=True)), "bits/masked character", title)
