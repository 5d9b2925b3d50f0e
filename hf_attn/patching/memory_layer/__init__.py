"""Memory layers (arXiv 2411.12992) in the place of linear layers of a pretrained model: [`convert_linear`]."""

from .conversion import LayerFit, MemoryConversion, convert_linear


__all__ = ["LayerFit", "MemoryConversion", "convert_linear"]
