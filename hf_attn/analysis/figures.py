"""Figures to draw on, for the plots of the package."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of the given size in inches, without a window.

    Raises:
        ImportError: if matplotlib (the extra `plot`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: `pip install 'hf_attn[plot]'`.") from error
    return Figure(figsize=(width, height), layout="constrained")
