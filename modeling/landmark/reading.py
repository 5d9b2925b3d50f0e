# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Retrieval statistics: how often each block of the memory was retrieved, and a plot of it."""

from pathlib import Path

import torch

from hf_attn.analysis.figures import new_figure

from .cache import LandmarkCache


def reading_counts(cache: LandmarkCache, row: int = 0, last_steps: int | None = None) -> torch.Tensor:
    """How often each block was read.

    Args:
        cache: made with `record_retrieved=True`.
        row: row of the batch.
        last_steps: look at this many steps of the model at the end, those that wrote an answer for example; all if not
            given.

    Returns:
        int64 `(layers, blocks)`: how many heads and queries of a layer chose a block; a choice that heads or queries share
        counts once. Block `n` holds regular tokens `n * mem_freq` to `(n + 1) * mem_freq - 1` of the row.

    Raises:
        ValueError: if retrieval was not recorded, if nothing was retrieved, or for numbers out of range.
    """
    if last_steps is not None and last_steps < 1:
        raise ValueError(f"last_steps must be at least 1, or None, got {last_steps}.")
    layers = cache.retrieved_blocks
    if not layers[0]:
        raise ValueError("Nothing was retrieved: the cache has no complete block, or no top_k.")
    if not 0 <= row < len(layers[0][0]):
        raise ValueError(f"row must be between 0 and {len(layers[0][0]) - 1}, got {row}.")
    blocks = int(cache.lengths[row]) // cache.block_size
    counts = torch.zeros(len(layers), blocks, dtype=torch.long)
    for layer, steps in enumerate(layers):
        for numbers in steps if last_steps is None else steps[-last_steps:]:
            read = numbers[row].flatten().cpu()
            counts[layer] += torch.bincount(read[read >= 0], minlength=blocks)
    return counts


def plot_reading(
    cache: LandmarkCache, path: str | Path, row: int = 0, last_steps: int | None = None, title: str = "Blocks read"
) -> None:
    """Draw [`reading_counts`] as a heat map of layers over blocks.

    Args:
        cache, row, last_steps: as of [`reading_counts`].
        path: file to write; its suffix sets the format.
        title: of the plot.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
        ValueError: as of [`reading_counts`].
    """
    counts = reading_counts(cache, row, last_steps)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    image = axes.imshow(100 * share.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="share of a layer's retrievals (%)")
    axes.set(xlabel=f"block of {cache.block_size - 1} tokens", ylabel="layer", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


__all__ = ["plot_reading", "reading_counts"]
