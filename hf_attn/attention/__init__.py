"""Attention functions: one file a mechanism, each registered under its name and the names of its implementations."""

from ..kernels.call import AttentionCall, Refusal
from .combiner import COMBINERS
from .dispatch import AttentionFunction, Implementation
from .interface import Mechanism, uses_attention
from .landmark import LANDMARK
from .sigmoid import SIGMOID


MECHANISMS: tuple[Mechanism, ...] = (SIGMOID, LANDMARK, *COMBINERS.values())

__all__ = [
    "COMBINERS",
    "LANDMARK",
    "MECHANISMS",
    "SIGMOID",
    "AttentionCall",
    "AttentionFunction",
    "Implementation",
    "Mechanism",
    "Refusal",
    "uses_attention",
]
