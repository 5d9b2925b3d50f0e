"""A small landmark model and a plain Llama, trained from random weights to recall facts, far beyond their training length.

Both have the same shape, data, order of the data, optimizer and number of steps.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..modeling.landmark.cache import LandmarkCache
from ..modeling.landmark.configuration_landmark import LandmarkConfig
from ..modeling.landmark.data import LandmarkDataCollator
from ..modeling.landmark.insertion import Insertion
from ..modeling.landmark.modeling_landmark import LandmarkForCausalLM
from ..training.stages import train_stage
from .recall import QUESTION, RecallBatches, RecallTask, RecallText, Stage


LANDMARK, LLAMA = "landmark", "llama"
MODELS = {LANDMARK: LandmarkForCausalLM, LLAMA: LlamaForCausalLM}
LABELS = {LANDMARK: "landmark, 4 blocks read", LLAMA: "Llama, all read"}
TRAIN_LENGTH = 512
#: regular tokens of a block
MEM_FREQ = 15
TOP_K = 4
#: facts of a text that is evaluated
NUM_FACTS = 8
TASK = RecallTask()
#: of the first training, of one layer, and of the second, of all
FIRST_STAGES = (Stage(0.0, 32, 6, 8),)
STAGES = (Stage(0.0, 64, 8, 8), Stage(0.2, 128, 8, 8), Stage(0.5, TRAIN_LENGTH, 8, 16))

RIGHT, MISREAD, MISSED, FOREIGN = "right", "block read, another value", "block not read", "no value of the text"


@dataclass(frozen=True)
class Settings:
    """Size and training of both models, which have two layers.

    Args:
        hidden_size, num_heads: shape; the MLP is four times as wide.
        first_steps: optimizer steps of the training of one layer.
        steps: optimizer steps of the training of both.
        num_tokens: tokens of a batch.
        learning_rate: highest, after a warm-up of 5 %; a cosine follows.
    """

    hidden_size: int = 64
    num_heads: int = 2
    first_steps: int = 300
    steps: int = 600
    num_tokens: int = 2048
    learning_rate: float = 4e-3


def make_model(name: str, settings: Settings, seed: int, num_layers: int = 2) -> PreTrainedModel:
    """A model with random weights: `"landmark"` or `"llama"`."""
    set_seed(seed)
    shape = {
        "hidden_size": settings.hidden_size,
        "intermediate_size": 4 * settings.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": settings.num_heads,
        "max_position_embeddings": TRAIN_LENGTH,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == LANDMARK:
        config = LandmarkConfig(
            **shape,
            vocab_size=TASK.vocab_size + 1,
            mem_freq=MEM_FREQ,
            train_context_length=TRAIN_LENGTH,
            include_landmark_in_loss=False,
        )
    else:
        config = LlamaConfig(**shape, vocab_size=TASK.vocab_size)
    return MODELS[name](config)


@contextmanager
def first_layer_as_read(model: PreTrainedModel, blocks: int = 0) -> Iterator[None]:
    """While this lasts, the first layer of a landmark model sees the newest blocks only.

    In the first layer all landmarks have one key, for they are one token, so that retrieval cannot choose there and takes the newest blocks.
    A training in which this layer sees everything learns to find facts in it, in all blocks alike, and fails once few are read.

    Args:
        model: a model with regular blocks; any other is left as it is.
        blocks: how many blocks are seen beside the own one.
    """
    if not isinstance(model, LandmarkForCausalLM):
        yield
        return

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        position = torch.arange((args[0] if args else kwargs["hidden_states"]).shape[1])
        block = position // model.config.block_size
        seen = (position <= position[:, None]) & (block >= block[:, None] - blocks)
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": seen[None, None] if mask is None else mask & seen}

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def grow(model: PreTrainedModel, settings: Settings, seed: int) -> PreTrainedModel:
    """A model with one layer more, before the others, that computes the same: the new layer adds nothing yet."""
    name = LANDMARK if isinstance(model, LandmarkForCausalLM) else LLAMA
    grown = make_model(name, settings, seed, model.config.num_hidden_layers + 1)
    moved = {
        re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + 1}", key): value
        for key, value in model.state_dict().items()
    }
    grown.load_state_dict(moved, strict=False)
    first = grown.model.layers[0]
    for projection in (first.self_attn.o_proj, first.mlp.down_proj):
        nn.init.zeros_(projection.weight)
    return grown


def train(name: str, settings: Settings, seed: int, folder: str | Path, **training_arguments: Any) -> Path:
    """Train a model, once: a training that was stopped goes on from its last checkpoint.

    One layer learns to recall from short texts. Then a layer grows before it, and both learn from longer ones: the landmark model to
    gather in its landmarks what a block states, by which the old layer chooses blocks.

    Args:
        name: `"landmark"` or `"llama"`.
        settings: size and training.
        seed: of weights and texts.
        folder: where the model goes; what comes before it is beside it.
        training_arguments: further `TrainingArguments`.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    one_layer = folder.with_name(f"{folder.name}-one-layer")

    def trainer(model: PreTrainedModel, steps: int, stages: Sequence[Stage], place: Path) -> Trainer:
        arguments = {
            "output_dir": str(place.with_name(f"{place.name}-checkpoints")),
            "max_steps": steps,
            "per_device_train_batch_size": 1,  # an item is a batch
            "train_sampling_strategy": "sequential",
            "learning_rate": settings.learning_rate,
            "weight_decay": 0.0,
            "adam_beta2": 0.98,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine",
            "logging_steps": 50,
            "save_steps": 300,
            "save_total_limit": 1,
            "report_to": [],
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "seed": seed,
            **training_arguments,
        }
        return Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=RecallBatches(TASK, stages, steps, settings.num_tokens, f"{seed} {len(model.model.layers)}"),
            data_collator=partial(_collate, LandmarkDataCollator(model.config) if name == LANDMARK else None),
        )

    if not folder.is_dir():
        first = make_model(name, settings, seed, num_layers=1)
        train_stage(trainer(first, settings.first_steps, FIRST_STAGES, one_layer), one_layer)
        model = grow(load(name, one_layer), settings, seed)
        with first_layer_as_read(model):
            train_stage(trainer(model, settings.steps, STAGES, folder), folder)
    return folder


def _collate(collator: LandmarkDataCollator | None, items: Sequence[list[dict]]) -> dict[str, torch.Tensor]:
    (texts,) = items
    if collator is not None:
        return collator(texts)
    return {key: torch.tensor([text[key] for text in texts]) for key in ("input_ids", "labels")}


def load(name: str, folder: str | Path) -> PreTrainedModel:
    """A trained model."""
    return MODELS[name].from_pretrained(folder)


def texts(length: int, count: int, num_facts: int = NUM_FACTS) -> list[RecallText]:
    """Texts to evaluate on, the same for all models; no training draws from their generators."""
    return [TASK.text(length, num_facts, random.Random(f"evaluation {length} {index}")) for index in range(count)]


def reading(model: PreTrainedModel, top_k: int | None = TOP_K) -> tuple[Cache, dict[str, bool]]:
    """An empty cache for a model, and what its forward needs besides."""
    if isinstance(model, LandmarkForCausalLM):
        cache = LandmarkCache(model.config, top_k=top_k, record_retrieved=top_k is not None)
        return cache, {"insert_landmarks": True}
    return DynamicCache(config=model.config), {}


@torch.no_grad()
def answer(model: PreTrainedModel, text: RecallText, top_k: int | None = TOP_K) -> list[str]:
    """Ask a model for all facts of a text, and say of each what came out.

    The text is read up to its questions; then come the questions with their answers, as a prompt with earlier questions would.

    Args:
        model: landmark model or any causal language model, in eval mode.
        text: what is read.
        top_k: blocks that a query of the landmark model reads; all if not given.

    Returns:
        For each question `"right"`, `"no value of the text"`, or, if another value of the text was named, `"block read, another
        value"` or `"block not read"`, by whether a head of the last layer retrieved a block with the fact. A model that reads
        everything has read the block.
    """
    ids = torch.tensor([text.input_ids])
    first = text.questions[0]
    cache, arguments = reading(model, top_k)
    model(ids[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    # With fewer blocks than that, all are read.
    retrieves = isinstance(cache, LandmarkCache) and top_k is not None and first // model.config.mem_freq > top_k
    steps_before = len(cache.retrieved_blocks[-1]) if retrieves else 0
    output = model(ids[:, first:], past_key_values=cache, use_cache=True, **arguments)
    predicted = output.logits[0, ::QUESTION].argmax(-1).tolist()
    given = [text.input_ids[question + 1] for question in text.questions]
    read = [True] * len(given)
    if retrieves:
        read = _facts_read(model.config, text, cache.retrieved_blocks[-1][steps_before:])
    outcomes = []
    for value, right, was_read in zip(predicted, given, read, strict=True):
        if value == right:
            outcomes.append(RIGHT)
        elif value not in given:
            outcomes.append(FOREIGN)
        else:
            outcomes.append(MISREAD if was_read else MISSED)
    return outcomes


def _facts_read(config: LandmarkConfig, text: RecallText, retrieved: Sequence[torch.Tensor]) -> list[bool]:
    """For each question, whether a head retrieved the block with its fact.

    Args:
        config: of the model.
        text: what was asked.
        retrieved: of one layer, for each piece of the questions, `(1, heads, queries, top_k)`.
    """
    first = text.questions[0]
    asked = torch.ones(1, len(text.input_ids) - first, dtype=torch.bool)
    places = Insertion.of(asked, config.mem_freq, torch.tensor([first])).place[0]
    blocks = torch.cat([piece[0] for piece in retrieved], dim=1)
    return [
        fact // config.mem_freq in blocks[:, places[question - first]]
        for question, fact in zip(text.questions, text.facts, strict=True)
    ]


def evaluate(model: PreTrainedModel, length: int, count: int, top_k: int | None = TOP_K) -> dict[str, Any]:
    """Outcomes of the questions of `count` texts, see [`answer`].

    Returns:
        `right`, the share of right answers, and `outcomes`, the number of each outcome.
    """
    outcomes = Counter(outcome for text in texts(length, count) for outcome in answer(model, text, top_k))
    return {"right": outcomes[RIGHT] / outcomes.total(), "outcomes": dict(outcomes)}


@torch.no_grad()
def decode_seconds(length: int, settings: Settings = Settings(), repeats: int = 5) -> dict[str, float]:
    """Median seconds in which a token is decoded after a text of some length, by model; the weights, which do not matter, are
    random. The models take turns; each decodes a block, so that the step which adds a landmark has its share."""
    text = texts(length, 1)[0]
    ids, models = torch.tensor([text.input_ids]), {name: make_model(name, settings, 0).eval() for name in MODELS}
    caches, seconds = {}, {name: [] for name in MODELS}
    for name, model in models.items():
        caches[name] = reading(model)
        cache, arguments = caches[name]
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    for turn in range(repeats + 1):
        for name, model in models.items():
            cache, arguments = caches[name]
            start = time.perf_counter()
            for _ in range(MEM_FREQ):
                model(ids[:, -1:], past_key_values=cache, use_cache=True, **arguments)
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / MEM_FREQ)
            cache.crop(-MEM_FREQ)
    return {name: median(found) for name, found in seconds.items()}


def draw_recall(found: Mapping[str, Mapping[int, Sequence[Mapping]]], axes) -> None:
    """Draw the share of right answers over the length of the text, with the range over seeds.

    Args:
        found: for each model and length, the result of [`evaluate`] for each seed.
        axes: of matplotlib.
    """
    for name, lengths in found.items():
        shares = [[100 * result["right"] for result in results] for results in lengths.values()]
        (line,) = axes.plot(list(lengths), [fmean(values) for values in shares], "o-", label=LABELS[name])
        axes.fill_between(
            list(lengths), list(map(min, shares)), list(map(max, shares)), alpha=0.2, color=line.get_color()
        )
    ticks = sorted({length for lengths in found.values() for length in lengths})
    axes.axvline(TRAIN_LENGTH, color="grey", linestyle=":", label="longest training text")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="length of the text in tokens", ylabel="right answers (%)", ylim=(-4, 104))
    axes.grid(alpha=0.3)
    axes.legend()
