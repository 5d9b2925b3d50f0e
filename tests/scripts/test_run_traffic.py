"""`scripts/run_traffic.py`: it learns the synthetic network, resumes, and reads files of the published layout."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from hf_attn import GMANConfig, GMANForPrediction
from hf_attn.modeling.gman.training import BatchNormMomentumCallback, staircase_schedule
from tests.batteries.scripts import loaded_script


QUIET = ("--report_to", "none", "--disable_tqdm", "true")


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_traffic") as module:
        yield module


@pytest.mark.slow
def test_the_synthetic_network_is_learned(script, tmp_path, capsys):
    metrics = script.main(["--output_dir", str(tmp_path), *QUIET])
    assert metrics["test_mae"] <= 2.25
    printed = capsys.readouterr().out
    assert "15,153 parameters" in printed and "best possible MAE" in printed and "historical average" in printed
    assert (tmp_path / "forecast.png").stat().st_size > 0
    assert json.loads((tmp_path / "test_results.json").read_text())["test_mae"] == pytest.approx(metrics["test_mae"])
    assert "## The mechanism" in (tmp_path / "README.md").read_text()


@pytest.fixture
def files(tmp_path):
    """Two days of four sensors, with their vectors in another order and their graph."""
    index = pd.date_range("2012-03-01", periods=192, freq="15min")
    table = pd.DataFrame(
        np.random.default_rng(0).uniform(20, 70, (192, 4)), index, ["773869", "767541", "767542", "717447"]
    )
    table.iloc[50] = 0
    table.to_hdf(tmp_path / "speed.h5", key="df")
    rows = ["4 64", *(f"{node} " + " ".join(["0.5", str(node), *["0"] * 62]) for node in (2, 0, 3, 1))]
    (tmp_path / "SE.txt").write_text("\n".join(rows))
    (tmp_path / "Adj.txt").write_text(
        "\n".join(f"{i} {j} {float(abs(i - j) < 2)}" for i in range(4) for j in range(4))
    )
    return tmp_path


def arguments(files, *others):
    small = ("--variant", "gman_pems", "--num_train_epochs", "1", "--context_length", "4", "--prediction_length", "3")
    data = ("--data_file", str(files / "speed.h5"))
    return [*data, "--output_dir", str(files / "out"), *small, *others, *QUIET]


def test_files_of_the_published_layout(script, files):
    metrics = script.main(arguments(files, "--spatial_embedding_file", str(files / "SE.txt")))
    assert set(metrics) >= {"test_mae", "test_rmse", "test_mape", "test_mae_step_3"}
    model = GMANForPrediction.from_pretrained(files / "out")
    config = model.config
    assert config.steps_per_day == 96 and config.sensor_ids[0] == "773869" and config.num_hidden_layers == 1
    assert model.gman.embeddings.spatial_embedding[:, 1].tolist() == [0, 1, 2, 3]
    assert 20 < config.value_mean < 70

    data = ("--data_file", str(files / "speed.h5"), "--output_dir", str(files / "again"))
    again = script.main(["--model_name_or_path", str(files / "out"), *data, "--do_eval", *QUIET])
    assert again["test_mae"] == pytest.approx(metrics["test_mae"], rel=1e-5)


def test_a_graph_gives_the_vectors(script, files):
    script.main(arguments(files, "--adjacency_file", str(files / "Adj.txt"), "--group_size", "2"))
    embedding = GMANForPrediction.from_pretrained(files / "out").gman.embeddings.spatial_embedding
    assert (embedding[:, :3].abs().sum(0) > 0).all() and (embedding[:, 3:] == 0).all()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ((), "pass either --adjacency_file or --spatial_embedding_file"),
        (("--adjacency_file", "nothing.txt"), "no file nothing.txt"),
        (("--adjacency_file", "{files}/SE.txt"), "line 2: 65 numbers instead of 2"),
        (("--adjacency_file", "{files}/Adj.txt", "--horizons", "7"), "--horizons must be between 1 and 3"),
        (("--adjacency_file", "{files}/Adj.txt", "--context_length", "200"), "too few for a window"),
        (("--model_name_or_path", "x"), "has its own"),
    ],
)
def test_what_does_not_fit(script, files, others, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments(files, *(word.format(files=files) for word in others)))


def test_the_stairs_of_the_official_recipe():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    schedule = staircase_schedule(optimizer, steps_per_epoch=2)
    rates = []
    for _ in range(400):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:21] == pytest.approx([1e-3] * 10 + [7e-4] * 10 + [4.9e-4])
    assert rates[-1] == pytest.approx(1e-5)

    class State:
        epoch = 0.0

    model, momenta = GMANForPrediction(GMANConfig.from_variant("tiny")), []
    for epoch in (0, 4, 5, 10, 200):
        State.epoch = float(epoch)
        BatchNormMomentumCallback().on_epoch_begin(None, State, None, model=model)
        momenta.append(model.head.norm1.momentum)
    assert momenta == [0.5, 0.5, 0.25, 0.125, 0.01]
