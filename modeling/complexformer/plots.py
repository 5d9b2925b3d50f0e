"""A plot of the learned parameters of the heads: the factor of the angle between query and key, and its offset."""

from typing import TYPE_CHECKING

from hf_attn.analysis.figures import new_figure

from .modeling_complexformer import ComplexFormerAttention, ComplexFormerPreTrainedModel


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_head_angles(model: ComplexFormerPreTrainedModel) -> "Figure":
    """Draw `delta` and `bias` of every layer, a row for each head and a column for each frequency, the highest first.

    Args:
        model: any model of the family. 1 and 0 are rotary attention, and white in the plot.

    Raises:
        ValueError: if the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, ComplexFormerAttention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no complex attention: plot_head_angles needs a ComplexFormer model."
        )
    figure = new_figure(9, 0.8 + 1.6 * len(layers))
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for column, (name, neutral) in enumerate((("delta", 1.0), ("bias", 0.0))):
        values = [getattr(layer, f"{name}_params").detach().float().cpu().numpy() for layer in layers]
        span = max(max(abs(value - neutral).max() for value in values), 1e-6)
        for i, value in enumerate(values):
            image = grid[i, column].imshow(
                value, aspect="auto", cmap="RdBu_r", vmin=neutral - span, vmax=neutral + span, interpolation="nearest"
            )
            grid[i, column].set_title(f"{name}, layer {layers[i].layer_idx}", loc="left", fontsize="small")
            grid[i, column].set_ylabel("head", fontsize="small")
        grid[-1, column].set_xlabel("pair of channels (frequency falls)", fontsize="small")
        figure.colorbar(image, ax=list(grid[:, column]), shrink=0.8)
    return figure


__all__ = ["plot_head_angles"]
