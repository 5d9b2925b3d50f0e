"""Measurements on the attention of any transformers model, and on the paths of a path ensemble."""

from .path_scores import PathScores, path_scores
from .similarity import AttentionSimilarity, attention_similarity


__all__ = ["AttentionSimilarity", "PathScores", "attention_similarity", "path_scores"]
