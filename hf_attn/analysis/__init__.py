"""Measurements on the attention of any transformers model, and on the paths of a path ensemble."""

from .indicators import AttentionIndicators, attention_indicators, head_diversity, measure_attention
from .path_scores import PathScores, path_scores
from .similarity import AttentionSimilarity, attention_similarity


__all__ = [
    "AttentionIndicators",
    "AttentionSimilarity",
    "PathScores",
    "attention_indicators",
    "attention_similarity",
    "head_diversity",
    "measure_attention",
    "path_scores",
]
