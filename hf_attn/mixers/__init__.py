"""Token mixers: attention and its alternatives, with one signature (arXiv 2302.06218)."""

from . import attention, fixed, linear, low_rank
from .base import MIXERS, TokenMixer, causal_mixers


__all__ = ["MIXERS", "TokenMixer", "attention", "causal_mixers", "fixed", "linear", "low_rank"]
