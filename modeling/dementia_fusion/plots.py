"""Plot of the transport plan: the spectrogram, and the regions to which optimal transport maps each word."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_attn.analysis.figures import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def words_over_time(plan: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """Share of each token that is transported to each point in time, `(tokens, num_columns)`; rows sum to 1.

    Args:
        plan: `(tokens, 1 + num_rows * num_columns)`, text to image; the first part of the image is the class token, and does not count.
        num_rows: rows of patches, which are frequencies.
        num_columns: columns of patches, which are moments.
    """
    if plan.shape[1] != 1 + num_rows * num_columns:
        raise ValueError(
            f"A plan over {num_rows} x {num_columns} patches and a class token has {1 + num_rows * num_columns} columns, got "
            f"{plan.shape[1]}."
        )
    moments = plan[:, 1:].reshape(len(plan), num_rows, num_columns).sum(1)
    return moments / np.maximum(moments.sum(1, keepdims=True), np.finfo(np.float64).tiny)


def plot_transport(levels: np.ndarray, seconds: float, tokens: Sequence[str], moments: np.ndarray) -> "Figure":
    """Draw the spectrogram and, below it, the times to which each token is transported.

    Args:
        levels: `(bands, frames)` in decibels.
        seconds: length of the recording.
        tokens: the tokens.
        moments: `(tokens, columns)`, see [`words_over_time`].

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
    """
    figure = new_figure(8, 3 + 0.18 * len(tokens))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 0.3 + 0.18 * len(tokens)))
    picture = upper.imshow(levels, aspect="auto", origin="lower", extent=(0, seconds, 0, len(levels)), cmap="magma")
    upper.set(ylabel="Mel band")
    figure.colorbar(picture, ax=upper, label="dB")
    picture = lower.imshow(moments, aspect="auto", extent=(0, seconds, len(tokens), 0), cmap="viridis", vmin=0)
    lower.set(xlabel="time (s)")
    lower.set_yticks(np.arange(len(tokens)) + 0.5, tokens)
    figure.colorbar(picture, ax=lower, label="share of the token")
    return figure
