"""A tiny processor, made without any file."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_attn.examples.synthetic_speech import word_tokenizer
from hf_attn.modeling.dementia_fusion.processing_dementia_fusion import (
    DementiaFusionProcessor,
    SpeechImageFeatureExtractor,
)


WORDS = ["there", "is", "a", "boy", "on", "stool", "cookie", "jar", "girl", "water"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens."""
    return word_tokenizer(WORDS)


def processor(**fields) -> DementiaFusionProcessor:
    size = {"height": 32, "width": 32}
    return DementiaFusionProcessor(SpeechImageFeatureExtractor(size=size, **fields), tokenizer())


def speech(seconds: float = 1.0, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Noise under a few tones."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (np.sin(2 * np.pi * 220 * time) * (1 + np.sin(8 * time)) + 0.1 * noise).astype(np.float32)
