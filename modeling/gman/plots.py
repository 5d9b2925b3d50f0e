"""Plots of forecasts, and of the sensors to which a forecast attended."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_attn.analysis.figures import new_figure


if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_forecast(
    history: "pd.DataFrame",
    forecast: "pd.DataFrame",
    truth: "pd.DataFrame | None" = None,
    sensors: Sequence[str] | None = None,
    sensor_attention: "pd.DataFrame | None" = None,
    top: int = 8,
) -> "Figure":
    """Draw history, forecast and truth, a row for each sensor.

    Args:
        history: rows are timestamps, columns are sensors; NaN is a gap.
        forecast: the same of the future steps.
        truth: measured values of the future steps.
        sensors: which to draw; the first four if not given.
        sensor_attention: share of the attention of each sensor (row) that goes to each sensor (column); drawn beside it.
        top: number of sensors with the largest shares to draw.

    Raises:
        ValueError: if a sensor is not in the forecast.
    """
    sensors = list(forecast.columns[:4]) if sensors is None else list(sensors)
    unknown = [name for name in sensors if name not in forecast.columns]
    if unknown or not sensors:
        raise ValueError(
            f"{', '.join(map(str, unknown)) or 'Nothing'} cannot be plotted; the forecast has "
            f"{', '.join(forecast.columns[:5])}{'...' if len(forecast.columns) > 5 else ''}."
        )
    columns = 1 if sensor_attention is None else 2
    figure = new_figure(8 + 4 * (columns - 1), 0.6 + 2.2 * len(sensors))
    grid = figure.subplots(len(sensors), columns, squeeze=False, width_ratios=[2, 1][:columns])
    for sensor, axes in zip(sensors, grid, strict=True):
        past, future = history[sensor], forecast[sensor]
        axes[0].plot(past.index, past, color="0.3", label="history")
        axes[0].plot(future.index, future, color="tab:red", marker=".", label="forecast")
        if truth is not None:
            axes[0].plot(truth.index, truth[sensor], color="tab:blue", label="truth")
        axes[0].axvline(future.index[0], color="0.8", linewidth=1)
        axes[0].set_title(str(sensor), loc="left", fontsize="medium")
        axes[0].tick_params(axis="x", labelrotation=20)
        if sensor_attention is not None:
            shares = sensor_attention.loc[sensor].nlargest(top)[::-1]
            axes[1].barh([str(name) for name in shares.index], shares, color="tab:red")
            axes[1].set_title("share of its attention", loc="left", fontsize="medium")
    grid[0, 0].legend(fontsize="small")
    return figure


__all__ = ["plot_forecast"]
