"""Attention maps of a vision transformer, as they are or reduced layer by layer while the model runs."""

from collections.abc import Callable
from functools import partial

import torch

from .gating import tapped
from .hops import Grid, patch_entropy
from .layout import ViTLayout


def observe_attention(
    layout: ViTLayout,
    pixel_values: torch.Tensor,
    observe: Callable[[int, torch.Tensor], None],
) -> None:
    """Run a model and show the attention weights `(images, heads, tokens, tokens)` of every layer to a function.

    The maps of one layer exist at a time, unless the function keeps them.
    """

    def tap(layer: int, weights: torch.Tensor) -> None:
        observe(layer, weights)

    with tapped(layout, {layer: partial(tap, layer) for layer in range(layout.num_layers)}):
        layout.run(pixel_values)


@torch.no_grad()
def attention_maps(layout: ViTLayout, pixel_values: torch.Tensor) -> torch.Tensor:
    """All maps `(layers, heads, images, tokens, tokens)`: for a few images, since they are large."""
    maps = [torch.empty(0)] * layout.num_layers

    def observe(layer: int, weights: torch.Tensor) -> None:
        maps[layer] = weights.transpose(0, 1)

    observe_attention(layout, pixel_values, observe)
    return torch.stack(maps)


class MeanMaps:
    """Attention averaged over images, batch by batch.

    Args:
        layout: the model.
        grid: its tokens.
    """

    def __init__(self, layout: ViTLayout, grid: Grid):
        self.layout, self.grid = layout, grid
        self.images = 0
        self._maps = torch.zeros(layout.num_layers, layout.num_heads, grid.num_tokens, grid.num_tokens)
        self._entropy = torch.zeros(layout.num_layers, layout.num_heads)

    @torch.no_grad()
    def add(self, pixel_values: torch.Tensor) -> None:
        """Add the maps of a batch `(images, channels, height, width)`."""

        def observe(layer: int, weights: torch.Tensor) -> None:
            # Image by image: the entropy has temporaries as large as the maps.
            for maps in weights.float():
                self._maps[layer] += maps.cpu()
                self._entropy[layer] += patch_entropy(maps, self.grid).cpu()

        observe_attention(self.layout, pixel_values, observe)
        self.images += len(pixel_values)

    @property
    def maps(self) -> torch.Tensor:
        """`(layers, heads, tokens, tokens)`, the mean over the images."""
        return self._maps / self.images

    @property
    def patch_entropy(self) -> torch.Tensor:
        """`(layers, heads)`, the mean over the images of the entropy of each."""
        return self._entropy / self.images
