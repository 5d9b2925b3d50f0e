"""A call of CLEAR attention."""

import math
from dataclasses import KW_ONLY, dataclass

import torch

from ..call import AttentionCall


@dataclass(eq=False)
class ClearCall(AttentionCall):
    """A call of CLEAR attention: text tokens first, then an image row by row.

    Attributes:
        grid: `(height, width)` of the image in tokens; what is left of the length is text, maybe none.
        radius: of the disc around an image token, in tokens; the cells at exactly this distance are outside.
        spatial_weight: weights of the tokens of a pooled cell, `(1, 1, 1, d, 1, d, 1)`; None for no pooled keys.
        text_mask: boolean `(batch, text)`, False for text that is padding and that no query attends to.
    """

    _: KW_ONLY
    grid: tuple[int, int]
    radius: int
    spatial_weight: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None

    @property
    def text_length(self) -> int:
        return self.query.shape[2] - self.grid[0] * self.grid[1]

    @property
    def down_factor(self) -> int:
        """Side of the cells of pooled keys, 1 for no pooled keys."""
        return 1 if self.spatial_weight is None else math.isqrt(self.spatial_weight.numel())

    def mask_arguments(self) -> tuple[int, int, int, int, int]:
        """Height, width, text length, radius and down factor, which the mask depends on."""
        return *self.grid, self.text_length, self.radius, self.down_factor
