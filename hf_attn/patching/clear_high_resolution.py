"""High resolutions with CLEAR: position encodings that reach further."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def ntk_scaled(transformer: nn.Module, factor: float) -> Iterator[None]:
    """Stretch the rotary position encoding of a FLUX transformer, for images larger than it was trained on.

    Args:
        transformer: a FLUX transformer; its base of the rotary frequencies is multiplied on all axes.
        factor: the paper uses 10 beyond 1024 x 1024 pixels.

    Raises:
        TypeError: if the model has no rotary position encoding, as SD3.
    """
    encoding = getattr(transformer, "pos_embed", None)
    if not hasattr(encoding, "theta"):
        raise TypeError(f"{type(transformer).__name__} has no rotary position encoding to stretch.")
    theta = encoding.theta
    encoding.theta = theta * factor
    try:
        yield
    finally:
        encoding.theta = theta
