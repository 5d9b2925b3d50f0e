"""The five designs of text embedders over tasks of three kinds, with one budget and the paper's statistics.

The decoder is a Llama of transformers that was trained on Python's documentation. An embedder is trained to find
paragraphs by their heading, by the paragraph before, and by their own first part. Each held-out topic is a task of
each kind: retrieval (heading) and similarity (paragraph before), both by the mean reciprocal rank, and classification
(the topic of a paragraph, by the nearest mean). Scores are means over seeds; designs are compared over tasks by
Wilcoxon's signed-rank test, without correction as in the paper.

Shown in small if

1. over the tasks of retrieval and similarity together design 5 (mean of each layer, bidirectional, trainable head) has
   the highest mean, and is significantly better than design 1 (last token, causal), the usual one,
2. no design has the highest mean in all three kinds of tasks.

Contradicted if over retrieval and similarity some design is significantly better than design 5. Otherwise not shown
here.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from statistics import fmean

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...analysis.paired_tests import paired_tests
from ...analysis.retrieval import retrieval_ranks
from ...examples.assets import load_texts, token_blocks
from ...examples.text_pairs import TextPair, text_pairs
from ...modeling.pooling_attention.modeling_pooling_attention import PoolingAttentionModel
from ...modeling.pooling_attention.tokenization import embedding_tokenizer
from ...training.contrastive import ContrastiveCollator, contrastive_loss
from ..drawing import COLORS
from ..result import Conclusion, Figure
from ..training import batches, optimise, tuned


DESIGNS = (1, 2, 3, 4, 5)
TOKENS, PAIRS, VOCAB_SIZE = 32, 32, 1500
KINDS = ("retrieval", "similarity", "classification")
#: relations of text pairs -> kinds of tasks
RELATIONS = {"heading": "retrieval", "neighbour": "similarity"}
#: minimum number of pairs of a held-out topic, and of queries of a task
HELD_OUT, LEAST = 9, 3
SIGNIFICANT = 0.05
END, PADDING = "</s>", "<pad>"


def measure(work) -> dict:
    steps, designs = ((2, 2), (1, 5)) if work.miniature else ((150, 250), DESIGNS)
    runs = {str(design): tuned(work, f"design{design}", partial(learn, design, steps)) for design in designs}
    return {"runs": runs}


@cache
def pairs() -> dict[str, list[TextPair]]:
    """Pairs of the splits `train`, `validation` and `test`; every second of the larger topics is in `test`."""
    found = text_pairs("train")
    counts = {}
    for pair in found:
        counts[pair.topic] = counts.get(pair.topic, 0) + (pair.task == "neighbour")
    larger = sorted(topic for topic, count in counts.items() if count >= HELD_OUT)
    test = set(larger[::2])
    others = [pair for pair in found if pair.topic not in test]
    return {
        "train": [pair for index, pair in enumerate(others) if index % 10],
        "validation": others[::10],
        "test": [pair for pair in found if pair.topic in test],
    }


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bytes_pairs = Tokenizer(models.BPE())
    bytes_pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[PADDING, END], initial_alphabet=alphabet, show_progress=False
    )
    bytes_pairs.train_from_iterator([pair.positive for pair in pairs()["train"]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_pairs, pad_token=PADDING, eos_token=END)


@cache
def decoder(steps: int, seed: int) -> LlamaForCausalLM:
    """A language model trained on the topics that are not held out."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        )
    )
    held_out = {pair.topic for pair in pairs()["test"]}
    texts = [text for text in load_texts("train") if text.split("\n", 1)[0].strip() not in held_out]
    blocks = token_blocks(texts, tokenizer(), TOKENS)
    order = batches(len(blocks), 2 * PAIRS, seed)
    optimise(model, lambda: model(blocks[(chosen := next(order))], labels=blocks[chosen]).loss, steps, 3e-3)
    return model


def learn(design: int, steps: tuple[int, int], seed: int, rate: float) -> dict:
    """Loss on the validation pairs, and the scores of the topics for each kind of task."""
    base = decoder(steps[0], seed)
    torch.manual_seed(seed)
    sizes = {"num_latents": 16, "num_pooling_heads": 4, "pooling_head_dim": 16, "pooling_init": "mean"}
    model = PoolingAttentionModel.from_base(base, design=design, **sizes)
    train = pairs()["train"]
    order, draw = batches(len(train), PAIRS, seed), random.Random(seed)
    optimise(model, lambda: pair_loss(model, [halved(train[index], draw) for index in next(order)]), steps[1], rate)
    with torch.no_grad():
        validation = pairs()["validation"]
        parts = [validation[start : start + PAIRS] for start in range(0, len(validation) - PAIRS + 1, PAIRS)]
        loss = fmean(pair_loss(model, part).item() for part in parts)
        return {"validation": loss, "scores": {kind: dict(scores) for kind, scores in evaluate(model)}}


def halved(pair: TextPair, draw: random.Random) -> TextPair:
    """Half of the time the pair itself, otherwise the two parts of its paragraph, cut at a random word."""
    if draw.random() < 0.5:
        return pair
    words = pair.positive.split()
    cut = draw.randrange(len(words) // 3, len(words) - len(words) // 3)
    return replace(pair, query=" ".join(words[:cut]), positive=" ".join(words[cut:]))


def pair_loss(model: PoolingAttentionModel, some: list[TextPair]) -> torch.Tensor:
    collate = ContrastiveCollator(embedding_tokenizer(tokenizer()), TOKENS)
    batch = collate([{"query": pair.query, "positive": pair.positive} for pair in some])
    roles = batch.pop("roles")
    embedded = model(**batch).pooler_output
    return contrastive_loss(embedded[roles == 0], embedded[roles == 1])


def embed(model: PoolingAttentionModel, texts: list[str]) -> torch.Tensor:
    """Normalised embeddings, `(texts, width)`."""
    ready = embedding_tokenizer(tokenizer())
    parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    found = [ready(part, **options) for part in parts]
    states = [model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]) for part in found]
    return F.normalize(torch.cat([state.pooler_output for state in states]), dim=-1)


def evaluate(model: PoolingAttentionModel) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    test = pairs()["test"]
    for relation, kind in RELATIONS.items():
        yield kind, reciprocal_ranks(model, [pair for pair in test if pair.task == relation])
    yield "classification", nearest_means(model, [pair for pair in test if pair.task == "neighbour"])


def reciprocal_ranks(model: PoolingAttentionModel, some: list[TextPair]) -> Iterator[tuple[str, float]]:
    """Mean reciprocal rank of each topic's queries; they search the paragraphs of all topics."""
    places = {text: place for place, text in enumerate(dict.fromkeys(pair.positive for pair in some))}
    answers: dict[tuple[str, str], set[int]] = {}
    for pair in some:
        answers.setdefault((pair.topic, pair.query), set()).add(places[pair.positive])
    queries = [query for _, query in answers]
    ignored = [{places[query]} if query in places else () for query in queries]
    ranks = retrieval_ranks(embed(model, queries), embed(model, list(places)), list(answers.values()), ignored)
    for topic in dict.fromkeys(topic for topic, _ in answers):
        own = [1 / int(rank) for rank, (other, _) in zip(ranks, answers, strict=True) if other == topic]
        if len(own) >= LEAST:
            yield topic, fmean(own)


def nearest_means(model: PoolingAttentionModel, some: list[TextPair]) -> Iterator[tuple[str, float]]:
    """Share of every second paragraph of a topic that is nearest to the mean of the topic's other paragraphs."""
    topics = list(dict.fromkeys(pair.topic for pair in some))
    paragraphs = [embed(model, [pair.positive for pair in some if pair.topic == topic]) for topic in topics]
    means = F.normalize(torch.stack([own[::2].mean(0) for own in paragraphs]), dim=-1)
    for index, (topic, own) in enumerate(zip(topics, paragraphs, strict=True)):
        yield topic, ((own[1::2] @ means.T).argmax(-1) == index).float().mean().item()


def scores_of(data: dict, kinds) -> dict[str, list[float]]:
    """Scores of each design on the tasks of some kinds, means over the seeds."""
    return {
        design: [
            fmean(run["scores"][kind][topic] for run in runs) for kind in kinds for topic in runs[0]["scores"][kind]
        ]
        for design, runs in data["runs"].items()
    }


def conclude(data: dict) -> Conclusion:
    figures, best = [], {}
    for kind in KINDS:
        means = {
            design: [100 * fmean(run["scores"][kind].values()) for run in runs]
            for design, runs in data["runs"].items()
        }
        unit = "% correct" if kind == "classification" else "% reciprocal rank"
        figures += [
            Figure.of(f"{kind}, design 5", unit, means["5"], f"design {design}", values)
            for design, values in means.items()
            if design != "5"
        ]
        best[kind] = max(means, key=lambda design: fmean(means[design]))
    scores = scores_of(data, ("retrieval", "similarity"))
    tests = {test.first: test for test in paired_tests(scores) if test.second == "5"}
    leader = max(scores, key=lambda design: fmean(scores[design]))
    better = [design for design, test in tests.items() if test.difference > 0 and test.p < SIGNIFICANT]
    beats = [design for design, test in tests.items() if test.difference < 0 and test.p < SIGNIFICANT]
    verdict = "not shown here"
    if leader == "5" and "1" in beats and len(set(best.values())) > 1:
        verdict = "shown in small"
    elif better:
        verdict = "contradicted here"
    why = (
        f"The best design is {', '.join(f'{design} in {kind}' for kind, design in best.items())}; over the {len(scores['5'])} tasks of "
        f"retrieval and similarity design 5 is significantly better than {_listed(beats)}, and significantly "
        f"worse than {_listed(better)}."
    )
    return Conclusion(tuple(figures), verdict, why)


def _listed(designs: list[str]) -> str:
    return f"designs {', '.join(designs)}" if designs else "none of the others"


def draw(data: dict, figure) -> None:
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        for index, values in enumerate(scores_of(data, (kind,)).values()):
            axes.plot([index] * len(values), values, "o", color=COLORS[index], alpha=0.4, markersize=4)
            axes.plot([index - 0.35, index + 0.35], [fmean(values)] * 2, color="black", linewidth=3)
        axes.set_xticks(range(len(data["runs"])), list(data["runs"]))
        axes.set_title(kind)
    figure.supxlabel(
        "design: 1 to 3 causal, last token; 4 and 5 bidirectional, all tokens; 3 and 5 all layers", fontsize=9
    )
    figure.axes[0].set_ylabel("score (dot: a task, line: mean)")
