"""Metrics for scanpaths, the sequences of objects that a person looks at while searching for one of them."""

from .behaviour import behaviour, behavioural_distance
from .maps import fixation_map, normalized_scanpath_saliency, object_similarity
from .metrics import ScanpathMetrics
from .multimatch import multimatch
from .sequences import edit_distance, sequence_score


__all__ = [
    "ScanpathMetrics",
    "behaviour",
    "behavioural_distance",
    "edit_distance",
    "fixation_map",
    "multimatch",
    "normalized_scanpath_saliency",
    "object_similarity",
    "sequence_score",
]
