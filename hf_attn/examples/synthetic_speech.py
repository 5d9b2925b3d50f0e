"""Synthetic recordings and transcripts whose class can be inferred only from both together.

A speaker has two independent random tendencies, to pause and to use filler words. The class is whether their sum is positive. A
classifier that knows only one of them has an accuracy of 75 % at best, one that knows both can be perfect. The signals are not speech.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SAMPLING_RATE = 16000
CONTENT = ("boy", "girl", "mother", "cookie", "jar", "stool", "sink", "water", "window", "plate", "kitchen", "curtain")
EMPTY = ("uh", "um", "thing", "that", "there", "something", "you", "know")
#: best possible accuracy with one of the modalities, and with both
BEST_ALONE, BEST_TOGETHER = 0.75, 1.0


@dataclass(frozen=True)
class SyntheticRecording:
    """A recording.

    Attributes:
        samples: `(samples,)`, at 16 kHz.
        text: the transcript.
        label: 1 if the tendencies have a positive sum.
        speaker: name of the speaker; a speaker has several recordings of one class.
    """

    samples: np.ndarray
    text: str
    label: int
    speaker: str


def synthetic_recordings(
    num_speakers: int, each: int = 2, seconds: float = 2.0, num_words: int = 20, seed: int = 0
) -> list[SyntheticRecording]:
    """Recordings of speakers, `each` of each."""
    generator = np.random.default_rng(seed)
    recordings = []
    for speaker in range(num_speakers):
        pausing, emptiness = generator.normal(size=2)
        label = int(pausing + emptiness > 0)
        for _ in range(each):
            samples = _babble(_share(pausing), seconds, generator)
            text = _words(_share(emptiness), num_words, generator)
            recordings.append(SyntheticRecording(samples, text, label, f"speaker{speaker}"))
    return recordings


def _share(tendency: float) -> float:
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 / (1 + np.exp(-1.5 * tendency))


def _babble(pauses: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """Harmonic sounds of a voice, with pauses that take this share of the time."""
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    pitch = generator.uniform(100, 220)
    voice = sum(np.sin(2 * np.pi * pitch * k * time + generator.uniform(0, 6)) / k for k in range(1, 20))
    slots = np.zeros(20)
    # Stratified, so that the share is kept in each recording.
    silent = round(pauses * len(slots) + generator.uniform(-0.5, 0.5))
    slots[generator.permutation(len(slots))[silent:]] = 1
    loudness = np.repeat(slots, -(-len(time) // len(slots)))[: len(time)]
    noise = generator.normal(size=len(time))
    return (0.1 * voice * loudness + 1e-3 * noise).astype(np.float32)


def _words(emptiness: float, number: int, generator: np.random.Generator) -> str:
    empty = round(emptiness * number + generator.uniform(-0.5, 0.5))
    words = [*generator.choice(EMPTY, empty), *generator.choice(CONTENT, number - empty)]
    return " ".join(generator.permutation(words))


def word_tokenizer(words: Sequence[str] = (*CONTENT, *EMPTY)) -> "PreTrainedTokenizerFast":
    """A tokenizer with a token for each of these words, and BERT's special tokens before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
