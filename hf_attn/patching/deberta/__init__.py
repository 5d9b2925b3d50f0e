"""Fast disentangled attention for every DeBERTa of transformers (arXiv 2006.03654), in place."""

from .patch import apply_fast_attention, remove_fast_attention


__all__ = ["apply_fast_attention", "remove_fast_attention"]
