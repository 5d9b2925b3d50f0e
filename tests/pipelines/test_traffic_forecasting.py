"""The pipeline `traffic-forecasting`: tables in; forecasts with timestamps and sensor names out."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from hf_attn import GMANConfig, GMANForPrediction
from hf_attn.modeling.gman.data import time_features


SENSORS = ["a", "b", "c", "d", "e", "f"]


def make_pipeline(**fields):
    torch.manual_seed(0)
    fields = {"sensor_ids": SENSORS, "value_mean": 50.0, "value_std": 10.0, "steps_per_day": 288, **fields}
    return pipeline("traffic-forecasting", model=GMANForPrediction(GMANConfig.from_variant("tiny", **fields)).eval())


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture
def table():
    index = pd.date_range("2024-03-04 22:00", periods=40, freq="5min")
    return pd.DataFrame(np.random.default_rng(0).uniform(20, 70, (40, 6)), index, SENSORS)


def test_the_next_steps_are_those_of_the_model(pipe, table):
    forecast = pipe(table)
    assert list(forecast.columns) == SENSORS
    assert list(forecast.index) == list(pd.date_range("2024-03-05 01:20", periods=4, freq="5min"))
    past = table.iloc[-5:]
    outputs = pipe.model(
        torch.tensor(past.to_numpy(), dtype=torch.float32)[None],
        torch.from_numpy(time_features(past.index, 288))[None],
        torch.from_numpy(time_features(forecast.index, 288))[None],
    )
    np.testing.assert_allclose(forecast, outputs.prediction_outputs[0].detach(), rtol=1e-6)


def test_files_and_lists(pipe, table, tmp_path):
    expected = pipe(table)
    table.to_csv(tmp_path / "t.csv")
    table.to_hdf(tmp_path / "t.h5", key="speed")
    for source in (tmp_path / "t.csv", str(tmp_path / "t.h5")):
        pd.testing.assert_frame_equal(pipe(source), expected, check_freq=False, check_index_type=False)
    results = pipe([table, table.iloc[:20]])
    pd.testing.assert_frame_equal(results[0], expected)
    assert results[1].index[0] == table.index[20]
    # The output is a valid input.
    expected.to_csv(tmp_path / "forecast.csv")
    again = pd.read_csv(tmp_path / "forecast.csv", index_col="timestamp", parse_dates=True)
    pd.testing.assert_frame_equal(again, expected, check_freq=False, check_index_type=False)


def test_sensors_are_found_by_name(pipe, table):
    expected = pipe(table)
    pd.testing.assert_frame_equal(pipe(table[SENSORS[::-1]]), expected)
    pd.testing.assert_frame_equal(pipe(table, sensors=["e", "b"]), expected[["e", "b"]])
    with pytest.raises(ValueError, match=r"1 are missing \(c\)"):
        pipe(table.drop(columns="c"))
    with pytest.raises(ValueError, match=r"1 are unknown \(g\)"):
        pipe(table.assign(g=1.0))
    with pytest.raises(ValueError, match="does not have the sensors g"):
        pipe(table, sensors="g")


def test_sensors_without_names_are_taken_in_order(table, monkeypatch):
    pipe = make_pipeline(sensor_ids=None)
    renamed = table.set_axis([str(number) for number in range(6)], axis=1)
    warnings = []
    monkeypatch.setattr("hf_attn.pipelines.traffic_forecasting.logger.warning_once", warnings.append)
    np.testing.assert_array_equal(pipe(renamed), pipe(table))
    assert warnings and "columns of the table are used in their order" in warnings[0]
    # A view with negative strides.
    backwards = pd.DataFrame(np.ascontiguousarray(table.to_numpy()[:, ::-1]), table.index)
    np.testing.assert_array_equal(pipe(table.iloc[:, ::-1]), pipe(backwards))
    with pytest.raises(ValueError, match="has 6 sensors, but the table has 5"):
        pipe(table.iloc[:, :5])


def test_missing_values_are_nan_zero_or_no_row(pipe, table):
    zero, gap = table.copy(), table.copy()
    zero.iloc[37], gap.iloc[37] = 0.0, np.nan
    expected = pipe(zero)
    pd.testing.assert_frame_equal(pipe(gap), expected)
    pd.testing.assert_frame_equal(pipe(table.drop(table.index[37])), expected)
    table.iloc[-5:] = 0.0
    with pytest.raises(ValueError, match="there is nothing to forecast from"):
        pipe(table)


def test_a_start_inside_the_table(pipe, table):
    earlier = pipe(table, start="2024-03-04 23:00")
    assert earlier.index[0] == pd.Timestamp("2024-03-04 23:00")
    pd.testing.assert_frame_equal(earlier, pipe(table.iloc[:12]), check_freq=False)
    with pytest.raises(ValueError, match="needs the 5 time steps before it, but the table has only 2"):
        pipe(table, start=table.index[2])
    with pytest.raises(ValueError, match="is not a multiple"):
        pipe(table, start="2024-03-04 23:01")
    with pytest.raises(ValueError, match="has only 0 of them"):
        pipe(table, start="2025-01-01")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.iloc[::-1], "unsorted"),
        (lambda t: pd.concat([t, t.iloc[-1:]]), "repeated"),
        (lambda t: t.iloc[::2], None),
        (lambda t: t.iloc[:3], "needs the 5 time steps"),
    ],
)
def test_bad_tables(pipe, table, spoil, message):
    if message is None:
        # Half of the steps are missing, and have missing values.
        assert pipe(spoil(table)).notna().all(axis=None)
        return
    with pytest.raises(ValueError, match=message):
        pipe(spoil(table))


def test_daylight_saving(pipe, table):
    # 01:55 is followed by 03:00.
    local = table.set_axis(
        pd.date_range(end="2024-03-10 03:10", periods=40, freq="5min", tz="America/Los_Angeles").tz_localize(None),
        axis=0,
    )
    forecast = pipe(local, time_zone="America/Los_Angeles")
    assert str(forecast.index[0]) == "2024-03-10 03:15:00-07:00"
    assert str(pipe(local.iloc[:-3], time_zone="America/Los_Angeles").index[0]) == "2024-03-10 03:00:00-07:00"
    with pytest.raises(ValueError, match="already have a time zone"):
        pipe(local.tz_localize("America/Los_Angeles"), time_zone="Europe/Berlin")


def test_sensor_attention(pipe, table):
    result = pipe(table, return_sensor_attention=True, sensors=["b", "a"])
    pd.testing.assert_frame_equal(result["forecast"], pipe(table)[["b", "a"]], rtol=1e-4)
    shares = result["sensor_attention"]
    assert list(shares.index) == ["b", "a"] and list(shares.columns) == SENSORS
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="with group attention"):
        make_pipeline(group_size=3)(table, return_sensor_attention=True)


def test_plots(pipe, table, tmp_path):
    table.iloc[10, 0] = 0.0
    figure = pipe.plot(table, sensors=["a", "f"], start=table.index[20], show_attention=True)
    assert len(figure.axes) == 4
    history, forecast, truth, _ = figure.axes[0].lines
    assert len(forecast.get_xdata()) == len(truth.get_xdata()) == 4
    assert np.isnan(history.get_ydata()[5]) and len(history.get_ydata()) == 15
    np.testing.assert_allclose(truth.get_ydata(), table["a"].iloc[20:24])
    figure.savefig(tmp_path / "f.png")
    # Nothing is known about the future.
    assert len(pipe.plot(table).axes[0].lines) == 3
    with pytest.raises(ValueError, match="g cannot be plotted"):
        pipe.plot(table, sensors=["g"])


def test_parameters_that_do_not_exist(pipe, table):
    with pytest.raises(TypeError, match="no parameter horizon"):
        pipe(table, horizon=3)


def test_from_a_folder(pipe, table, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = pipeline("traffic-forecasting", model=str(tmp_path))
    pd.testing.assert_frame_equal(loaded(table), pipe(table), rtol=1e-5)
