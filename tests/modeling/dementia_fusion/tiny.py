"""A tiny processor, made without any file."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_attn.modeling.dementia_fusion.processing_dementia_fusion import (
    DementiaFusionProcessor,
    SpeechImageFeatureExtractor,
)


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "there",
    "is",
    "a",
    "boy",
    "on",
    "stool",
    "cookie",
    "jar",
    "girl",
    "water",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def processor(**fields) -> DementiaFusionProcessor:
    size = {"height": 32, "width": 32}
    return DementiaFusionProcessor(SpeechImageFeatureExtractor(size=size, **fields), tokenizer())


def speech(seconds: float = 1.0, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Noise under a few tones."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (np.sin(2 * np.pi * 220 * time) * (1 + np.sin(8 * time)) + 0.1 * noise).astype(np.float32)
