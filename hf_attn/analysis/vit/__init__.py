"""Which attention heads of a vision transformer matter, how far they look, and what patterns they have."""

from .analysis import analyze_vit
from .analysis import analyze_vit as analyze
from .gating import partial_mask, without_attention, without_heads
from .hops import Grid, attention_strength, offset_map, patch_entropy, ring_mass, ring_mean
from .layout import UnknownLayoutError, ViTLayout
from .metrics import prediction_change, representation_change
from .patterns import HeadClusters, cluster_heads, pattern_of
from .results import ViTAnalysis
from .structural import cut_heads, zero_heads, zeroed_heads


__all__ = [
    "Grid",
    "HeadClusters",
    "UnknownLayoutError",
    "ViTAnalysis",
    "ViTLayout",
    "analyze",
    "analyze_vit",
    "attention_strength",
    "cluster_heads",
    "cut_heads",
    "offset_map",
    "partial_mask",
    "patch_entropy",
    "pattern_of",
    "prediction_change",
    "representation_change",
    "ring_mass",
    "ring_mean",
    "without_attention",
    "without_heads",
    "zero_heads",
    "zeroed_heads",
]
