"""The quickstart end to end with a few steps; the real one runs by `make quickstart`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_attn.examples import quickstart as module
from hf_attn.examples.quickstart import quickstart
from hf_attn.examples.threads import use_free_cores
from hf_attn.training.output_folder import RECORD, OutputFolderError


@pytest.fixture(autouse=True)
def fewer_photographs(monkeypatch):
    pytest.importorskip("skimage")
    photographs = module.load_photographs()
    # Keep three photographs: the third one is shown, and the right quarters are evaluated.
    monkeypatch.setattr(module, "load_photographs", lambda: [photograph[:160] for photograph in photographs[:3]])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_from_photographs_to_a_folder_for_the_hub(tmp_path, capsys):
    results = quickstart(tmp_path, steps=12)
    assert [row["steps"] for row in results["course"]] == [2, 5, 8, 12]
    assert results["hat"] == results["course"][-1]
    # Initialised as interpolation, so a few steps cannot make it much worse than bicubic.
    assert abs(results["hat"]["psnr"] - results["bicubic"]["psnr"]) < 3
    printed = capsys.readouterr().out
    for expected in (
        "bicubic",
        "[3/3] On held-out photographs",
        f"hf upload YOUR-NAME/small-hat {tmp_path / 'model'}",
    ):
        assert expected in printed
    assert Image.open(tmp_path / "comparison.png").size == (3 * (6 * module.SIDE + 8) - 8, 6 * module.SIDE + 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "comparison.png", "model", "results.json"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "modeling_hf_attn.py"}
    assert f"| PSNR of bicubic enlargement, dB | {results['bicubic']['psnr']:.6g} |" in (
        tmp_path / "model" / "README.md"
    ).read_text(encoding="utf-8")
    pipe = pipeline("image-restoration", model=str(tmp_path / "model"), device="cpu")
    assert pipe(np.zeros((5, 9, 3), dtype=np.uint8)).size == (18, 10)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_second_run_redoes_nothing(tmp_path, monkeypatch):
    first = quickstart(tmp_path, steps=4)
    monkeypatch.setattr(module._Quickstart, "train", None)
    assert quickstart(tmp_path, steps=4) == first
    with pytest.raises(OutputFolderError, match=r"steps \(4 -> 5\)"):
        quickstart(tmp_path, steps=5)


def test_an_interrupted_run_is_resumed(tmp_path, monkeypatch, capsys):
    measure = module._Quickstart.measure
    measured = []

    def interrupted(self, enlarge):
        measured.append(enlarge)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(self, enlarge)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Quickstart, "measure", interrupted)
        quickstart(tmp_path, steps=8)
    assert "Run the same command to continue it" in capsys.readouterr().err
    results = quickstart(tmp_path, steps=8)
    assert [row["steps"] for row in results["course"]] == [2, 3, 5, 8]
    assert not (tmp_path / "training.pt").exists()


@pytest.mark.parametrize("length", [{"steps": 0}, {"seconds": 0}, {"seconds": float("inf")}])
def test_a_training_without_a_length_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match="must be positive"):
        quickstart(tmp_path / "out", **length)
    assert not (tmp_path / "out").exists()


def test_threads_are_no_more_than_before():
    before = torch.get_num_threads()
    assert 1 <= use_free_cores(rounds=1) == torch.get_num_threads() <= before
