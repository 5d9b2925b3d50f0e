"""EchoAtt: similarity of neighbouring attention maps, and a student that shares maps against one with a dropped layer.

The maps are those of SmolLM2-135M on text. The students are made from a small Llama of transformers that was trained
first: half of the layers share a map, or one layer is dropped, the one whose removal costs the least on the validation
split; both need the same number of operations. They are trained by the paper's two stages, pseudo-labels of the
teacher and then text. The teacher is trained for as many more steps on text.

Shown in small if

1. in SmolLM2 neighbouring inner layers are more alike than the first or the last layer and its neighbour,
2. the student's loss on held-out text is at most 3 % above that of the teacher trained on, in the mean over seeds,
3. and it is lower than that with a layer dropped for every seed, by more than the spread.

Contradicted if its loss is higher than with a layer dropped in the same sense, or if inner layers are not more alike.
Otherwise not shown here.
"""

from functools import cache, partial
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ...analysis.similarity import attention_similarity
from ...examples.assets import load_texts, smollm2_folder, token_blocks
from ...modeling.echo_att.distillation import (
    block_ends,
    hard_label_loss,
    intermediate_loss,
    recorded_layers,
    soft_label_loss,
)
from ...modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from ..drawing import bars
from ..language import LENGTH, VOCAB_SIZE, bits_a_character, causal_loss, random_stretches, train_language_model
from ..result import Conclusion, Figure, agreement
from ..training import operations, optimise, tuned


LAYERS, SHARED = 8, 4
NEAR = 3
#: number and length of the texts on which maps are compared
TEXTS, TOKENS = 8, 256
TEACHER_RATE = 3e-3
OWN, DROPPED, TEACHER = "EchoAtt", "a layer dropped", "teacher, trained on"


def measure(work) -> dict:
    steps = (2, 2, 2) if work.miniature else (400, 120, 40)
    alike = work.part("similarity", similarity_of_neighbours, work.miniature)
    cost = {name: cost_of(make(LlamaForCausalLM(shape(LAYERS)))[0]) for name, make in STUDENTS.items()}
    if not 0.97 <= cost[OWN] / cost[DROPPED] <= 1.03:
        raise RuntimeError(f"The students need {cost} operations.")
    runs = {
        name: tuned(work, name.replace(", ", "-").replace(" ", "-"), partial(learn, name, steps)) for name in STUDENTS
    }
    return {"similarity": alike, "operations": cost, "runs": runs}


def similarity_of_neighbours(miniature: bool) -> list[list[float]]:
    """Similarity of all pairs of layers of SmolLM2, or of a small model for a miniature."""
    if miniature:
        return attention_similarity(
            teacher(2, 0), random_stretches(torch.Generator().manual_seed(0))[:2], progress=False
        ).similarity.tolist()
    folder = smollm2_folder()
    blocks = token_blocks(load_texts("test"), AutoTokenizer.from_pretrained(folder), TOKENS)[:TEXTS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = attention_similarity(model, blocks, progress=False).similarity
    return [[round(value, 4) for value in row] for row in found.tolist()]


def shape(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )


@cache
def teacher(steps: int, seed: int) -> PreTrainedModel:
    return train_language_model(lambda: LlamaForCausalLM(shape(LAYERS)), steps, seed, TEACHER_RATE)[0]


def sharing(base: PreTrainedModel) -> tuple[PreTrainedModel, list[tuple[int, int]]]:
    """The student that shares maps, and pairs of a layer of the student and the layer of the teacher it is compared with."""
    texts = random_stretches(torch.Generator().manual_seed(0))
    found = attention_similarity(base, texts, progress=False)
    student = EchoAttForCausalLM.from_base(base, shared_layers=found.shared_layers(num_shared=SHARED))
    return student, [(layer, layer) for layer in block_ends(student.config)]


def dropping(base: PreTrainedModel) -> tuple[PreTrainedModel, list[tuple[int, int]]]:
    """The student without the layer whose removal costs the least; the layer before it is compared with the dropped one."""
    candidates = {layer: without_layer(base, layer) for layer in range(1, LAYERS)}
    dropped = min(candidates, key=lambda layer: bits_a_character(candidates[layer], "validation"))
    return candidates[dropped], [(dropped - 1, dropped)]


def trained_on(base: PreTrainedModel) -> tuple[PreTrainedModel, list[tuple[int, int]]]:
    return copied(base, range(LAYERS)), []


def without_layer(base: PreTrainedModel, dropped: int) -> PreTrainedModel:
    return copied(base, [layer for layer in range(LAYERS) if layer != dropped])


def copied(base: PreTrainedModel, layers) -> PreTrainedModel:
    """A Llama with some of the layers of another one."""
    model = LlamaForCausalLM(shape(len(layers))).eval()
    model.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(base.model.norm.state_dict())
    for own, layer in zip(model.model.layers, layers, strict=True):
        own.load_state_dict(base.model.layers[layer].state_dict())
    return model


STUDENTS = {OWN: sharing, DROPPED: dropping, TEACHER: trained_on}


def cost_of(model: PreTrainedModel) -> int:
    """Operations per text, with the implementation that does not compute a shared map again."""
    model.set_attn_implementation("eager")
    return operations(model, torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)


def learn(name: str, steps: tuple[int, int, int], seed: int, rate: float) -> dict[str, float]:
    """Bits per character of a student on the validation and test splits, and on the test split before its training."""
    base = teacher(steps[0], seed)
    torch.manual_seed(seed)
    student, compared = STUDENTS[name](base)
    before = bits_a_character(student, "test")
    generator = torch.Generator().manual_seed(seed)

    def of_text() -> torch.Tensor:
        return causal_loss(student, random_stretches(generator))

    def of_teacher() -> torch.Tensor:
        texts = random_stretches(generator)
        ours, theirs = zip(*compared, strict=True)
        with torch.no_grad(), recorded_layers(base, theirs) as wanted:
            targets = base(texts, use_cache=False).logits
        with recorded_layers(student, ours) as states:
            logits = student(texts, use_cache=False).logits
        soft, hard = soft_label_loss(logits, targets), hard_label_loss(logits, targets)
        return intermediate_loss(states, wanted) / 4 + soft / 4 + hard / 2

    for count, loss in zip(steps[1:], (of_teacher if compared else of_text, of_text), strict=True):
        optimise(student, loss, count, rate)
    return {**{split: bits_a_character(student, split) for split in ("validation", "test")}, "before": before}


def neighbours(similarity: list[list[float]]) -> tuple[list[float], list[float]]:
    """Similarity of neighbouring inner layers, and of the first and of the last layer with its neighbour."""
    pairs = [similarity[layer][layer + 1] for layer in range(len(similarity) - 1)]
    return pairs[1:-1], [pairs[0], pairs[-1]]


def conclude(data: dict) -> Conclusion:
    inner, outer = map(fmean, neighbours(data["similarity"]))
    losses = {name: [run["test"] for run in runs] for name, runs in data["runs"].items()}
    own, dropped, peer = losses[OWN], losses[DROPPED], losses[TEACHER]
    before = {name: [run["before"] for run in data["runs"][name]] for name in (OWN, DROPPED)}
    name = f"loss on held-out text, {SHARED} of {LAYERS} layers share"
    figures = (
        Figure.of(
            "similarity of maps of neighbouring inner layers, SmolLM2-135M", "", inner, "first and last layer", outer
        ),
        Figure.of(name, "bits/character", own, DROPPED, dropped),
        Figure.of(name, "bits/character", own, TEACHER, peer),
        Figure.of("the same before distillation", "bits/character", before[OWN], DROPPED, before[DROPPED]),
        Figure.of(
            "operations per character",
            "thousand",
            data["operations"][OWN] / LENGTH / 1e3,
            TEACHER,
            data["operations"][TEACHER] / LENGTH / 1e3,
        ),
    )
    order, excess = agreement(dropped, own), 100 * (fmean(own) / fmean(peer) - 1)
    words = {1: "lower than", 0: "not clearly different from", -1: "higher than"}[order]
    why = (
        f"Neighbouring inner layers have a mean similarity of {inner:.2f}, the outer ones of {outer:.2f}; the loss of the student differs by "
        f"{excess:+.1f} % from that of the teacher and is {words} that with a layer dropped, at equal cost."
    )
    verdict = "not shown here"
    if inner > outer and excess <= NEAR and order == 1:
        verdict = "shown in small"
    elif inner <= outer or order == -1:
        verdict = "contradicted here"
    return Conclusion(figures, verdict, why)


def draw(data: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    image = left.imshow(data["similarity"], vmin=0, vmax=1, origin="lower")
    figure.colorbar(image, ax=left, shrink=0.8)
    left.set(xlabel="layer", ylabel="layer", title="similarity of attention maps\n(SmolLM2)")
    losses = {
        name.replace(", ", ",\n").replace("layer ", "layer\n"): [run["test"] for run in runs]
        for name, runs in data["runs"].items()
    }
    bars(right, losses, "bits/character", "small models: held-out loss\n(lower is better)")
