"""Pipeline `traffic-forecasting`: a table of measurements in, a table of the next steps out."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import Pipeline
from transformers.utils import logging

from hf_attn.modeling.gman.data import order_sensors, read_table, regular_grid, step_of, time_features
from hf_attn.modeling.gman.plots import plot_forecast
from hf_attn.pipelines.heads import check_head


if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)


class TrafficForecastingPipeline(Pipeline):
    """Forecasts the sensors of a road network with a model of `AutoModelForTimeSeriesPrediction` (GMAN).

        pipe = pipeline("traffic-forecasting", model="...")
        forecast = pipe("speeds.csv")
        pipe.plot("speeds.csv", sensors=["773869"], start="2012-06-20 08:00").savefig("forecast.png")

    The measurements are a pandas DataFrame, a CSV or an HDF5 file whose rows are timestamps and whose columns are sensors, or a
    list of them. The sensors are found by name, in any order. A missing value is NaN or the model's null value (0); a missing row
    is a row of missing values. The result is a DataFrame with a row for each future step and a column for each sensor, which
    `to_csv` writes as a file that can be read again.

    Parameters, for the call or the constructor:

    - **start** (`str` or `Timestamp`): the first step to forecast; the step after the last row if not given. Only rows before
      it are read.
    - **time_zone** (`str`): zone of timestamps that do not say theirs, such as "America/Los_Angeles". With a zone, the hours
      that daylight saving time skips and repeats are distinguished from gaps and repeated rows.
    - **sensors** (`list[str]`): sensors to return; all if not given. The model always reads all.
    - **return_sensor_attention** (`bool`): return a dictionary of "forecast" and "sensor_attention", a DataFrame with the share of
      the spatial attention of each sensor (row) that goes to each sensor (column), averaged over blocks, heads and steps.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_head(self.model)
        self.model.eval()

    def _sanitize_parameters(self, start=None, time_zone=None, sensors=None, return_sensor_attention=None, **unknown):
        if unknown:
            raise TypeError(
                f"traffic-forecasting has no parameter {', '.join(sorted(unknown))}. Parameters: start, time_zone, sensors, "
                "return_sensor_attention."
            )
        table = {"start": start, "time_zone": time_zone}
        forward = {"return_sensor_attention": return_sensor_attention}
        return (
            {name: value for name, value in table.items() if value is not None},
            {name: value for name, value in forward.items() if value is not None},
            {} if sensors is None else {"sensors": [sensors] if isinstance(sensors, str) else list(sensors)},
        )

    def preprocess(self, inputs, start=None, time_zone: str | None = None) -> dict:
        grid = self._grid(inputs, time_zone)
        start = self._start(grid, start)
        config = self.model.config
        step = step_of(config.steps_per_day)
        history = grid.loc[start - config.context_length * step : start - step]
        if len(history) < config.context_length:
            raise ValueError(
                f"A forecast from {start} needs the {config.context_length} time steps before it, but the table has only "
                f"{len(history)} of them: it begins at {grid.index[0]} and ends at {grid.index[-1]}."
            )
        missing = history.isna()
        if config.null_value is not None:
            missing |= history == config.null_value
        if missing.all(axis=None):
            raise ValueError(
                f"All values from {history.index[0]} to {history.index[-1]} are missing; there is nothing to forecast from."
            )
        silent = history.columns[missing.all()]
        if len(silent):
            logger.warning(
                f"{len(silent)} of {len(history.columns)} sensors have no value from {history.index[0]} to "
                f"{history.index[-1]}: {', '.join(silent[:5])}{'...' if len(silent) > 5 else ''}."
            )
        future = self._steps(start, config.prediction_length, step)
        return {
            # A copy: a table with its columns reversed is a view that PyTorch does not take.
            "past_values": torch.from_numpy(np.array(history.to_numpy(), dtype=np.float32))[None],
            "past_time_features": torch.from_numpy(time_features(history.index, config.steps_per_day))[None],
            "future_time_features": torch.from_numpy(time_features(future, config.steps_per_day))[None],
            "timestamps": future,
            "names": list(history.columns),
        }

    def _forward(self, inputs: dict, return_sensor_attention: bool = False) -> dict:
        if return_sensor_attention and self.model.config.group_size is not None:
            raise ValueError("A model with group attention has no attention between all pairs of sensors to return.")
        timestamps, names = inputs.pop("timestamps"), inputs.pop("names")
        outputs = self.model(**inputs, output_attentions=return_sensor_attention)
        result = {"values": outputs.prediction_outputs[0], "timestamps": timestamps, "names": names}
        if return_sensor_attention:
            # (heads, steps, from, to) of each block.
            result["shares"] = torch.stack([maps[0].float().mean((0, 1)) for maps in outputs.spatial_attentions]).mean(
                0
            )
        return result

    def postprocess(self, outputs: dict, sensors: list[str] | None = None) -> "pd.DataFrame | dict[str, pd.DataFrame]":
        import pandas as pd

        names = outputs["names"]
        values = outputs["values"].double().numpy()
        forecast = pd.DataFrame(values, outputs["timestamps"].rename("timestamp"), names)
        sensors = names if sensors is None else sensors
        unknown = [name for name in sensors if name not in names]
        if unknown:
            raise ValueError(f"The model does not have the sensors {', '.join(unknown[:5])}.")
        forecast = forecast[sensors]
        if "shares" not in outputs:
            return forecast
        shares = pd.DataFrame(outputs["shares"].double().numpy(), names, names)
        return {"forecast": forecast, "sensor_attention": shares.loc[sensors]}

    def plot(
        self,
        inputs: "pd.DataFrame | str | Path",
        sensors: list[str] | None = None,
        start=None,
        time_zone: str | None = None,
        show_attention: bool = False,
        history_steps: int | None = None,
    ) -> "Figure":
        """Draw history, forecast and, if the table has it, truth of some sensors.

        Args:
            inputs: the measurements.
            sensors: which to draw; the first four if not given.
            start: the first step to forecast.
            time_zone: zone of the timestamps.
            show_attention: draw the sensors that the forecast of each sensor looked at most.
            history_steps: steps of history to draw; three times those that the model reads if not given.

        Returns:
            A matplotlib figure; `figure.savefig("forecast.png")` saves it.
        """
        sensors = [sensors] if isinstance(sensors, str) else sensors
        result = self(inputs, start=start, time_zone=time_zone, return_sensor_attention=show_attention)
        forecast = result["forecast"] if show_attention else result
        grid = self._grid(inputs, time_zone)
        config = self.model.config
        if config.null_value is not None:
            grid = grid.mask(grid == config.null_value)
        step = step_of(config.steps_per_day)
        first = forecast.index[0]
        truth = grid.loc[first : forecast.index[-1]]
        return plot_forecast(
            grid.loc[first - (history_steps or 3 * config.context_length) * step : first - step],
            forecast,
            truth if len(truth) else None,
            sensors,
            result["sensor_attention"] if show_attention else None,
        )

    def _grid(self, inputs: "pd.DataFrame | str | Path", time_zone: str | None) -> "pd.DataFrame":
        """The measurements on the model's grid of time steps, the sensors in its order."""
        config = self.model.config
        table = read_table(inputs)
        if config.sensor_ids is not None:
            table = order_sensors(table, config.sensor_ids)
        elif len(table.columns) != config.num_nodes:
            raise ValueError(f"The model has {config.num_nodes} sensors, but the table has {len(table.columns)}.")
        else:
            logger.warning_once(
                "The model has no sensor names (`config.sensor_ids`), so the columns of the table are used in their "
                "order."
            )
        return regular_grid(table, config.steps_per_day, time_zone)

    def _start(self, grid: "pd.DataFrame", start) -> "pd.Timestamp":
        import pandas as pd

        step = step_of(self.model.config.steps_per_day)
        if start is None:
            return grid.index[-1] + step
        start = pd.Timestamp(start)
        if start.tz is None and grid.index.tz is not None:
            start = start.tz_localize(grid.index.tz)
        elif start.tz is not None and grid.index.tz is None:
            raise ValueError(f"start={start} has a time zone, but the timestamps have none: pass time_zone.")
        if (start - grid.index[0]) % step != pd.Timedelta(0):
            raise ValueError(f"start={start} is not a multiple of the time step of {step}.")
        return start

    @staticmethod
    def _steps(start: "pd.Timestamp", length: int, step: "pd.Timedelta") -> "pd.DatetimeIndex":
        import pandas as pd

        return pd.date_range(start, periods=length, freq=step)
