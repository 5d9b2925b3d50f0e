"""Measurements of sensors: files, a regular grid of time steps, windows and their time features."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch


if TYPE_CHECKING:
    import pandas as pd


def _pandas():
    try:
        import pandas
    except ImportError as error:
        raise ImportError("Traffic tables need pandas: `pip install 'hf_attn[traffic]'`.") from error
    return pandas


def read_table(source: "pd.DataFrame | str | Path") -> "pd.DataFrame":
    """Read measurements: rows are timestamps, columns are sensors.

    Args:
        source: a DataFrame; a CSV file with the timestamps in its first column; or an HDF5 file of pandas such as those of
            METR-LA and PeMS-BAY.

    Returns:
        Floats with timestamps as index and names of sensors, as strings, as columns.

    Raises:
        ValueError: if the file cannot be read, there are no rows, rows have no timestamps, or a column is not numeric or has
            infinite values.
        FileNotFoundError: if there is no such file.
    """
    pd = _pandas()
    name = "The table"
    if isinstance(source, str | Path):
        path = Path(source)
        name = path.name
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        if path.suffix.lower() in (".h5", ".hdf5", ".hdf"):
            try:
                table = pd.read_hdf(path)
            except ImportError as error:
                raise ImportError(f"Reading {name} needs tables: `pip install 'hf_attn[traffic]'`.") from error
            except Exception as error:  # of many kinds, with the whole trace of HDF5
                raise ValueError(f"{name} is not an HDF5 file written by pandas: {_last_line(error)}") from error
        else:
            try:
                table = pd.read_csv(path, index_col=0)
            except ValueError as error:
                raise ValueError(f"{name} is not a CSV table: {_last_line(error)}") from error
    elif isinstance(source, pd.DataFrame):
        table = source
    else:
        raise TypeError(f"Measurements must be a DataFrame or the path of a file, got {type(source).__name__}.")

    if not len(table):
        raise ValueError(f"{name} has no rows.")
    if not isinstance(table.index, pd.DatetimeIndex):
        if pd.api.types.is_numeric_dtype(table.index):
            raise ValueError(
                f"{name} must have timestamps as its index (first column), got numbers: {table.index[:3].tolist()}."
            )
        try:
            table = table.set_axis(pd.to_datetime(table.index), axis=0)
        except (ValueError, TypeError) as error:
            reason = _last_line(error)
            if not pd.to_datetime(table.index, errors="coerce", utc=True).hasnans:
                reason = (
                    "they have several time zones; convert all to UTC, or remove the time zones and pass time_zone."
                )
            raise ValueError(f"{name} must have timestamps as its index (first column): {reason}") from error
    if table.index.hasnans:
        raise ValueError(f"{name} has rows without a timestamp.")
    table = table.set_axis(table.columns.astype(str), axis=1)
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"{name} has sensor {repeated[0]} more than once.")
    for column in table.columns:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise ValueError(f"{name}: column {column} is not numeric ({table[column].dtype}).")
    table = table.astype(np.float64)
    infinite = np.isinf(table.to_numpy()).any(axis=0)
    if infinite.any():
        raise ValueError(f"{name}: sensor {table.columns[infinite][0]} has infinite values; a missing one is NaN.")
    return table


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def step_of(steps_per_day: int) -> "pd.Timedelta":
    """Length of a time step."""
    return _pandas().Timedelta(days=1) / steps_per_day


def steps_per_day_of(table: "pd.DataFrame") -> int:
    """Time steps of a day, from the most frequent distance of the rows.

    Raises:
        ValueError: if a day is not a multiple of that, or there are fewer than two rows.
    """
    pd = _pandas()
    if len(table) < 2:
        raise ValueError("At least two rows are needed to determine the length of a time step.")
    step = pd.Series(table.index).diff().dropna().mode().iloc[0]
    steps = pd.Timedelta(days=1) / step if step > pd.Timedelta(0) else 0
    if steps != round(steps) or steps < 1:
        raise ValueError(f"The rows are {step} apart, but a day must be a multiple of the time step.")
    return round(steps)


def regular_grid(table: "pd.DataFrame", steps_per_day: int, time_zone: str | None = None) -> "pd.DataFrame":
    """Align the rows to equal time steps; steps without a row become missing values (NaN).

    Args:
        table: as of [`read_table`].
        steps_per_day: time steps of a day.
        time_zone: zone of timestamps that do not say theirs, such as "America/Los_Angeles". With a zone an hour that
            daylight saving skips is not a gap, and one that it repeats is not a repetition.

    Raises:
        ValueError: if timestamps are unsorted, repeated or off the grid, or if there are more gaps than rows.
    """
    pd = _pandas()
    index = table.index
    if not len(index):
        raise ValueError("The table has no rows.")
    if time_zone is not None:
        if index.tz is not None:
            raise ValueError(
                f"time_zone={time_zone!r} was passed, but the timestamps already have a time zone ({index.tz})."
            )
        try:
            index = index.tz_localize(time_zone, ambiguous="infer")
        except KeyError:
            raise ValueError(
                f"There is no time zone {time_zone!r}; use a name such as 'America/Los_Angeles'."
            ) from None
        except ValueError as error:
            # The advice of pandas is about arguments of its own.
            reason = str(error).split(". ")[0].rstrip(".")
            raise ValueError(
                f"The timestamps are not valid in the time zone {time_zone}: {reason}. Leave time_zone out if they do "
                "not follow its daylight saving time."
            ) from error
        table = table.set_axis(index, axis=0)
    distances = index[1:] - index[:-1]
    for problem, where in (("repeated", distances == pd.Timedelta(0)), ("unsorted", distances < pd.Timedelta(0))):
        if where.any():
            advice = (
                "Sort the table with `table.sort_index()`."
                if problem == "unsorted"
                else "Drop one of them, or pass time_zone if daylight saving repeats an hour."
            )
            raise ValueError(f"The timestamps are {problem} at {index[1:][where][0]}. {advice}")
    step = step_of(steps_per_day)
    # Grids begin at midnight; a whole number of steps from it also in zones that are not a whole number of hours apart.
    naive = index.tz_localize(None)
    off = (naive - naive.normalize()) % step != pd.Timedelta(0)
    if off.any():
        raise ValueError(
            f"The timestamp {index[off][0]} is not a multiple of the time step of {step}. Resample the table, for "
            f"example with `table.resample('{step.total_seconds():g}s').mean()`."
        )
    length = round((index[-1] - index[0]) / step) + 1
    if length > 2 * len(index) and length > len(index) + steps_per_day:
        raise ValueError(f"The table has {len(index)} rows for {length} time steps of {step}. Check the time step.")
    return table.reindex(pd.date_range(index[0], periods=length, freq=step))


def time_features(index: "pd.DatetimeIndex", steps_per_day: int) -> np.ndarray:
    """Day of week (Monday is 0) and time slot of the day by local time, `(len(index), 2)` integers."""
    day, hour, minute, second = (
        np.asarray(part, np.int64) for part in (index.day_of_week, index.hour, index.minute, index.second)
    )
    return np.stack([day, (hour * 3600 + minute * 60 + second) * steps_per_day // 86400], axis=1)


def order_sensors(table: "pd.DataFrame", sensor_ids: Sequence[str], what: str = "The table") -> "pd.DataFrame":
    """The columns of the sensors that a model knows, in its order.

    Raises:
        ValueError: if sensors are missing, or there are others.
    """
    missing = [name for name in sensor_ids if name not in table.columns]
    unknown = [name for name in table.columns if name not in set(sensor_ids)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} are missing ({', '.join(missing[:5])}{'...' if len(missing) > 5 else ''})")
    if unknown:
        problems.append(f"{len(unknown)} are unknown ({', '.join(unknown[:5])}{'...' if len(unknown) > 5 else ''})")
    if problems:
        raise ValueError(
            f"{what} does not have exactly the {len(sensor_ids)} sensors of the model: {' and '.join(problems)}. Add "
            "a column of NaN for a sensor without measurements, and drop unknown sensors."
        )
    return table[list(sensor_ids)]


class TrafficWindows(torch.utils.data.Dataset):
    """All windows of history and future steps in a table on a regular grid, as inputs of GMAN.

    Args:
        table: as of [`regular_grid`].
        steps_per_day: time steps of a day.
        context_length: history steps.
        prediction_length: future steps.

    Raises:
        ValueError: if the table is shorter than one window.
    """

    def __init__(self, table: "pd.DataFrame", steps_per_day: int, context_length: int, prediction_length: int):
        self.context_length, self.length = context_length, context_length + prediction_length
        if len(table) < self.length:
            raise ValueError(
                f"{len(table)} time steps are too few for a window of {context_length} past and {prediction_length} "
                "future steps."
            )
        self.values = torch.from_numpy(np.array(table.to_numpy(), dtype=np.float32))
        self.features = torch.from_numpy(time_features(table.index, steps_per_day))

    def __len__(self) -> int:
        return len(self.values) - self.length + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Window {index} is out of range: there are {len(self)} windows.")
        middle, end = index + self.context_length, index + self.length
        return {
            "past_values": self.values[index:middle],
            "past_time_features": self.features[index:middle],
            "future_time_features": self.features[middle:end],
            "labels": self.values[middle:end],
        }

    def statistics(self, null_value: float | None = 0.0) -> tuple[float, float]:
        """Mean and standard deviation of the histories of all windows, missing values included as `null_value`.

        That is what the official code normalises with. Without a null value, missing ones are left out.
        """
        values = self.values.double().numpy()
        if null_value is not None:
            values = np.nan_to_num(values, nan=null_value)
        # Number of windows that contain each step.
        steps = np.arange(len(values))
        last = len(self) - 1
        counts = np.minimum(steps, last) - np.maximum(steps - self.context_length + 1, 0) + 1
        weights = np.clip(counts, 0, None)[:, None] * ~np.isnan(values)
        values = np.nan_to_num(values)
        mean = (weights * values).sum() / weights.sum()
        return float(mean), float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))


def split_by_time(table: "pd.DataFrame", train: float = 0.7, test: float = 0.2) -> dict[str, "pd.DataFrame"]:
    """Cut a table into "train", "validation" and "test", in this order of time; windows are cut inside each part."""
    first, last = round(train * len(table)), round(test * len(table))
    return {
        "train": table.iloc[:first],
        "validation": table.iloc[first : len(table) - last],
        "test": table.iloc[len(table) - last :],
    }
