"""Measurements on the attention of any transformers model."""

from .similarity import AttentionSimilarity, attention_similarity


__all__ = ["AttentionSimilarity", "attention_similarity"]
