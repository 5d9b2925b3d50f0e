"""Attention functions: one file a mechanism, each registered under its name and the names of its implementations."""

from .interface import Implementation, Mechanism, uses_attention
from .landmark import LANDMARK
from .sigmoid import SIGMOID


MECHANISMS: tuple[Mechanism, ...] = (SIGMOID, LANDMARK)

__all__ = ["MECHANISMS", "Implementation", "Mechanism", "uses_attention"]
