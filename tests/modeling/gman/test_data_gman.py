"""Tables, time steps, windows, graphs, errors and baselines."""

import numpy as np
import pandas as pd
import pytest
import torch

from hf_attn.examples.synthetic_traffic import synthetic_traffic
from hf_attn.modeling.gman import baselines, graph
from hf_attn.modeling.gman.data import (
    TrafficWindows,
    order_sensors,
    read_table,
    regular_grid,
    split_by_time,
    steps_per_day_of,
    time_features,
)
from hf_attn.modeling.gman.metrics import forecast_errors


@pytest.fixture
def table():
    index = pd.date_range("2017-03-10", periods=400, freq="5min")
    return pd.DataFrame(np.random.default_rng(0).uniform(20, 70, (400, 3)), index, ["a", "b", "c"])


class TestTables:
    def test_files(self, table, tmp_path):
        table.iloc[3, 1] = np.nan
        table.to_csv(tmp_path / "t.csv")
        table.to_hdf(tmp_path / "t.h5", key="df")
        for name in ("t.csv", "t.h5"):
            read = read_table(tmp_path / name)
            pd.testing.assert_frame_equal(read, table, check_freq=False, check_index_type=False, check_names=False)

    def test_sensors_are_named_by_strings(self):
        index = pd.date_range("2017-01-01", periods=2, freq="5min")
        assert list(read_table(pd.DataFrame([[1, 2], [3, 4]], index, [773869, 767541])).columns) == [
            "773869",
            "767541",
        ]

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda t: t.reset_index(drop=True), "got numbers"),
            (lambda t: t.set_axis(["x"] * len(t), axis=0), "must have timestamps"),
            (
                lambda t: t[:2].set_axis(["2024-03-10 01:00-08:00", "2024-03-10 03:00-07:00"]),
                "several time zones",
            ),
            (lambda t: t.assign(b="fast"), "column b is not numeric"),
            (lambda t: t.assign(b=np.inf), "sensor b has infinite values"),
            (lambda t: t.iloc[:0], "The table has no rows"),
            (lambda t: t.set_axis(["a", "b", "a"], axis=1), "sensor a more than once"),
        ],
    )
    def test_bad_tables(self, table, spoil, message):
        with pytest.raises(ValueError, match=message):
            read_table(spoil(table))

    def test_no_file_and_no_table(self):
        with pytest.raises(FileNotFoundError, match=r"no file nothing\.csv"):
            read_table("nothing.csv")
        with pytest.raises(TypeError, match="got list"):
            read_table([1])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.csv", b"", r"t\.csv is not a CSV table"),
            ("t.csv", bytes(range(256)), r"t\.csv is not a CSV table"),
            ("t.csv", b"time,a,b\n", r"t\.csv has no rows"),
            ("t.h5", b"nothing", r"t\.h5 is not an HDF5 file written by pandas: .*"),
        ],
    )
    def test_bad_files(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            read_table(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_sensors_by_name(self, table):
        assert list(order_sensors(table[["c", "a", "b"]], ["a", "b", "c"]).columns) == ["a", "b", "c"]
        with pytest.raises(ValueError, match=r"1 are missing \(d\) and 1 are unknown \(c\)"):
            order_sensors(table, ["a", "b", "d"])


class TestTimeSteps:
    def test_gaps_become_missing_rows(self, table):
        grid = regular_grid(table.drop(table.index[10:13]), 288)
        assert len(grid) == 400 and grid.iloc[10:13].isna().all(axis=None) and grid.isna().sum().sum() == 9

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda t: t.iloc[::-1], "unsorted at 2017-03-11 09:10:00"),
            (lambda t: pd.concat([t.iloc[:5], t.iloc[4:]]), "repeated at 2017-03-10 00:20:00"),
            (lambda t: t.set_axis(t.index + pd.Timedelta("1min"), axis=0), "00:01:00 is not a multiple"),
            (lambda t: t.iloc[::12], "34 rows for 397 time steps"),
            (lambda t: t.iloc[:0], "no rows"),
        ],
    )
    def test_bad_timestamps(self, table, spoil, message):
        with pytest.raises(ValueError, match=message):
            regular_grid(spoil(table), 288)

    def test_an_hour_that_daylight_saving_skips_is_no_gap(self):
        zone = pd.date_range("2017-03-12", periods=276, freq="5min", tz="America/Los_Angeles")
        local = pd.DataFrame(np.ones((276, 1)), zone.tz_localize(None), ["a"])
        assert local.index[-1] == pd.Timestamp("2017-03-12 23:55")
        assert len(regular_grid(local, 288)) == 288
        grid = regular_grid(local, 288, "America/Los_Angeles")
        assert len(grid) == 276 and not grid.isna().any(axis=None)
        # 01:55 is followed by 03:00, which has the slot of three o'clock.
        assert time_features(grid.index[23:25], 288)[:, 1].tolist() == [23, 36]

    def test_an_hour_that_daylight_saving_repeats(self):
        zone = pd.date_range("2017-11-05", periods=300, freq="5min", tz="America/Los_Angeles")
        local = pd.DataFrame(np.ones((300, 1)), zone.tz_localize(None), ["a"])
        with pytest.raises(ValueError, match="pass time_zone if daylight saving"):
            regular_grid(local.sort_index(), 288)
        assert len(regular_grid(local, 288, "America/Los_Angeles")) == 300
        once = local[~local.index.duplicated()]
        with pytest.raises(ValueError, match=r"2017-11-05 01:00:00 is an ambiguous time.*Leave time_zone out"):
            regular_grid(once, 288, "America/Los_Angeles")
        with pytest.raises(ValueError, match="no time zone 'Mars/Olympus'"):
            regular_grid(once, 288, "Mars/Olympus")

    def test_features_are_local_day_and_slot(self):
        index = pd.DatetimeIndex(["2024-01-01 00:00", "2024-01-07 23:59:59", "2024-01-03 12:30"])
        assert time_features(index, 48).tolist() == [[0, 0], [6, 47], [2, 25]]

    def test_the_step_of_a_table(self, table):
        assert steps_per_day_of(table.drop(table.index[5:60])) == 288
        with pytest.raises(ValueError, match="a day must be a multiple of the time step"):
            steps_per_day_of(table.set_axis(pd.date_range("2017-01-01", periods=400, freq="7min"), axis=0))


class TestWindows:
    def test_windows(self, table):
        windows = TrafficWindows(table, 288, 12, 6)
        assert len(windows) == 383
        window = windows[382]
        np.testing.assert_allclose(window["labels"], table.to_numpy()[-6:], rtol=1e-6)
        np.testing.assert_allclose(window["past_values"], table.to_numpy()[-18:-6], rtol=1e-6)
        assert window["future_time_features"].tolist() == time_features(table.index[-6:], 288).tolist()
        with pytest.raises(IndexError):
            windows[383]
        with pytest.raises(ValueError, match="17 time steps are too few"):
            TrafficWindows(table.iloc[:17], 288, 12, 6)

    def test_statistics_are_those_of_the_histories_of_all_windows(self, table):
        table.iloc[5, 0], table.iloc[200, 1] = 0.0, np.nan
        windows = TrafficWindows(table, 288, 12, 6)
        stacked = torch.stack([window["past_values"] for window in windows]).double()
        mean, std = windows.statistics()
        filled = stacked.nan_to_num(0.0)
        assert mean == pytest.approx(filled.mean().item()) and std == pytest.approx(filled.std(correction=0).item())
        mean, _ = windows.statistics(null_value=None)
        assert mean == pytest.approx(stacked.nanmean().item())

    def test_the_published_numbers_of_windows(self):
        """Sizes of METR-LA and PeMS-BAY, from the card of the data."""
        for steps, sizes in ((34272, (23967, 3405, 6831)), (52116, (36458, 5189, 10400))):
            parts = split_by_time(pd.DataFrame(np.zeros((steps, 1))))
            assert tuple(len(parts[name]) - 23 for name in ("train", "validation", "test")) == sizes


class TestGraphs:
    def test_vectors_in_any_order(self, tmp_path):
        file = tmp_path / "SE.txt"
        file.write_text("3 2\n2 5 6\n0 1 2\n1 3 4\n")
        assert graph.read_spatial_embedding(file).tolist() == [[1, 2], [3, 4], [5, 6]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("3 2\n2 5 6\n0 1 2\n0 3 4\n", "node 0 more than once"),
            ("3 2\n2 5 6\n0 1 2\n", "2 vectors, but its first line says 3"),
            ("2 2\n2 5 6\n0 1 2\n", "node 2 is not an index between 0 and 1"),
            ("2 2\n1 5 6 7\n0 1 2\n", "line 2: 4 numbers instead of 3"),
            ("2 2\n1 5 six\n0 1 2\n", "line 2: could not convert"),
            ("2 2\n1 5 nan\n0 1 2\n", "the vector of node 1 is not finite"),
            ("nodes\n", "must be 'nodes width'"),
        ],
    )
    def test_bad_vectors(self, text, message, tmp_path):
        (tmp_path / "SE.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            graph.read_spatial_embedding(tmp_path / "SE.txt")

    def test_adjacency(self, tmp_path):
        expected = np.array([[1, 0.5, 0], [0, 1, 0.25], [0, 0, 1]])
        lines = [f"{i} {j} {expected[i, j]}" for i in range(3) for j in range(3)]
        (tmp_path / "edges.txt").write_text("\n".join(lines))
        (tmp_path / "matrix.csv").write_text("\n".join(",".join(map(str, row)) for row in expected))
        np.save(tmp_path / "matrix.npy", expected)
        for name in ("edges.txt", "matrix.csv", "matrix.npy"):
            np.testing.assert_array_equal(graph.read_adjacency(tmp_path / name, 3), expected)
        with pytest.raises(ValueError, match="for 4 nodes"):
            graph.read_adjacency(tmp_path / "matrix.npy", 4)
        with pytest.raises(ValueError, match="2 is not an index between 0 and 1"):
            graph.read_adjacency(tmp_path / "edges.txt", 2)

    def test_spectral_embedding_of_a_ring(self):
        ring = np.roll(np.eye(8), 1, axis=1)
        embedding = graph.spectral_embedding(ring, 10).double()
        assert embedding.shape == (8, 10) and (embedding[:, 7:] == 0).all()
        # Orthogonal to each other and to the constant, with entries of size 1.
        torch.testing.assert_close(embedding[:, :7].T @ embedding[:, :7] / 8, torch.eye(7).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(embedding.sum(0), torch.zeros(10).double(), atol=1e-4, rtol=0)
        # The smoothest pair of a ring is a circle.
        radius = embedding[:, :2].square().sum(1)
        torch.testing.assert_close(radius, torch.full((8,), 2.0).double(), atol=1e-5, rtol=0)

    def test_distances(self):
        distances = np.array([[0.0, 1.0, np.inf], [1.0, 0.0, 9.0], [np.inf, 9.0, 0.0]])
        scale = np.array([0, 1, 1, 0, 9, 9, 0]).std()
        adjacency = graph.adjacency_from_distances(distances)
        np.testing.assert_allclose(adjacency[0], [1, np.exp(-1 / scale**2), 0])
        assert adjacency[1, 2] == 0


class TestErrors:
    def test_by_hand(self):
        truth = np.array([[[10.0, 0.0], [20.0, np.nan]], [[30.0, 40.0], [50.0, 60.0]]])
        forecast = np.array([[[12.0, 99.0], [20.0, 99.0]], [[27.0, 40.0], [50.0, 54.0]]])
        errors = forecast_errors(forecast, truth)
        np.testing.assert_allclose(errors["mae"], [5 / 3, 2.0, 11 / 6])
        np.testing.assert_allclose(errors["rmse"], np.sqrt([13 / 3, 12.0, 49 / 6]))
        np.testing.assert_allclose(errors["mape"], [0.1, 0.1 / 3, 0.4 / 6])
        assert forecast_errors(forecast, truth, None)["mae"][0] == pytest.approx(104 / 4)

    def test_nothing_observed(self):
        assert np.isnan(forecast_errors(np.ones((1, 2, 3)), np.zeros((1, 2, 3)))["mae"]).all()
        with pytest.raises(ValueError, match="the same shape"):
            forecast_errors(np.ones((1, 2, 3)), np.ones((1, 2)))


def test_baselines():
    index = pd.date_range("2024-01-01", periods=21, freq="8h")
    train = pd.DataFrame(np.arange(42.0).reshape(21, 2), index, ["a", "b"])
    train.iloc[0] = [0, np.nan]
    later = index + pd.Timedelta(days=7)
    average = baselines.historical_average(train, later, 3)
    np.testing.assert_allclose(average[1:], train.to_numpy()[1:])
    np.testing.assert_allclose(average[0], train.iloc[1:].mean())
    latest = baselines.last_value(np.array([[np.nan, 1.0], [2.0, 0.0], [0.0, 3.0]]))
    np.testing.assert_array_equal(latest, [[np.nan, 1], [2, 1], [2, 3]])


def test_the_best_forecast_of_the_synthetic_data_is_as_good_as_promised():
    """Documented errors against those of the ideal forecast on the data."""
    data = synthetic_traffic(missing=0.0)
    promised = data.best_mae(6)
    np.testing.assert_allclose(promised, [1.20, 1.42, 1.55, 1.64, 1.71, 1.76], atol=0.005)
    values = data.speeds.to_numpy()
    deviation = values - data.profile
    for step in (1, 3, 6):
        best = data.profile[step:] + deviation[:-step] @ np.linalg.matrix_power(data.transition, step).T
        assert np.abs(values[step:] - best).mean() == pytest.approx(promised[step - 1], rel=0.03)
