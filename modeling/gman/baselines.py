"""Forecasts without a model, to compare with."""

from typing import TYPE_CHECKING

import numpy as np

from .data import time_features


if TYPE_CHECKING:
    import pandas as pd


def historical_average(
    train: "pd.DataFrame", index: "pd.DatetimeIndex", steps_per_day: int, null_value: float | None = 0.0
) -> np.ndarray:
    """Mean of the same day of week and time slot in the training part.

    Slots without a measurement have the mean of their sensor.

    Args:
        train: rows are time steps, columns are sensors.
        index: time steps to forecast.
        steps_per_day: time steps of a day.
        null_value: value that marks missing data.

    Returns:
        `(len(index), sensors)`.
    """
    values = train.to_numpy()
    values = values if null_value is None else np.where(values == null_value, np.nan, values)
    observed = ~np.isnan(values)

    def slots(timestamps: "pd.DatetimeIndex") -> np.ndarray:
        return time_features(timestamps, steps_per_day) @ np.array([steps_per_day, 1])

    sums, counts = (np.zeros((7 * steps_per_day, values.shape[1])) for _ in range(2))
    np.add.at(sums, slots(train.index), np.nan_to_num(values))
    np.add.at(counts, slots(train.index), observed)
    of_sensors = np.nan_to_num(values).sum(axis=0) / np.maximum(observed.sum(axis=0), 1)
    averages = np.where(counts > 0, sums / np.maximum(counts, 1), of_sensors)
    return averages[slots(index)]


def last_value(values: np.ndarray, null_value: float | None = 0.0) -> np.ndarray:
    """The latest measurement up to each time step, `(steps, sensors)`; NaN before the first one."""
    values = np.where(values == null_value, np.nan, values) if null_value is not None else np.array(values, float)
    latest = np.where(np.isnan(values), -1, np.arange(len(values))[:, None])
    latest = np.maximum.accumulate(latest, axis=0)
    filled = np.take_along_axis(values, np.maximum(latest, 0), axis=0)
    return np.where(latest < 0, np.nan, filled)
