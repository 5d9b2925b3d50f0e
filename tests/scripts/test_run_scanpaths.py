"""`run_scanpaths.py`: trains, evaluates, draws, goes on; and what it refuses."""

import json

import pytest
from PIL import Image

from hf_attn import AutoModelForScanpathPrediction
from tests.batteries.scripts import loaded_script


QUIET = ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_scanpaths") as module:
        yield module


def test_generated_scenes_end_to_end(script, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--num_images", "20", "--searches", "2", "--num_samples", "2"]
    arguments += ["--num_drawings", "1", *QUIET]
    table = script.main([*arguments, "--num_train_epochs", "2"])
    assert (
        "32 scanpaths to train on, 4 to validate, 4 to test; the splits have no images in common"
        in capsys.readouterr().out
    )
    assert set(table) == {"model, greedy", "model, sampled", "random walk", "saliency"}
    assert 0 <= table["model, greedy"]["sim"] <= 1
    assert json.loads((tmp_path / "out" / "test_results.json").read_text()) == table
    assert Image.open(tmp_path / "out" / "drawings" / "0_true_and_predicted.png").size[0] > 1200
    model = AutoModelForScanpathPrediction.from_pretrained(tmp_path / "out")
    assert model.config.num_columns == 6
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_delta"] for entry in state["log_history"] if "eval_delta" in entry)

    with pytest.raises(SystemExit, match="is not empty"):
        script.main(arguments)
    resumed = [*arguments, "--resume_from_checkpoint", "last", "--num_train_epochs", "3", "--do_train"]
    script.main(resumed)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == 3
    assert [entry["epoch"] for entry in state["log_history"] if "eval_delta" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "amazon", "--model_name_or_path", "x"], "--variant is for models from scratch"),
        (["--variant", "beer"], "is not one of amazon"),
        (["--variant", "wine", "--shelf_table", "a.csv", "--trials", "b.jsonl"], "pass one of"),
        (["--variant", "wine", "--shelf_table", "a.csv"], "--image_dir, the folder with the images, is missing"),
        (["--trials", "b.jsonl"], "pass --variant or --model_name_or_path"),
        (["--variant", "amazon", "--trials", "missing.jsonl"], "missing.jsonl"),
        (["--num_images", "2"], "2 images cannot be split"),
    ],
)
def test_refusals(script, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(["--output_dir", str(tmp_path), *arguments, *QUIET])
