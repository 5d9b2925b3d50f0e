"""`scripts/compare_mixers.py`: every mixer on both tasks, resumed, and refused for other settings."""

import pytest
import torch

from hf_attn.mixers import MIXERS, causal_mixers
from tests.batteries.scripts import loaded_script


pytest.importorskip("matplotlib", reason="the script draws its results")

SMALL = ["--steps", "1", "--batch_size", "2", "--hidden_size", "8", "--layers", "1", "--lengths", "12"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("compare_mixers") as module:
        yield module


def test_all_mixers_run_and_a_run_is_continued(script, tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "out")]
    rows = script.main([*SMALL, *folder])
    found = [(row["task"], row["mixer"]) for row in rows]
    assert found == [("recall", name) for name in MIXERS] + [("text", name) for name in causal_mixers()]
    assert all(0 <= row["quality"] <= 1 for row in rows if row["task"] == "recall")
    assert all(6 < row["quality"] < 10 for row in rows if row["task"] == "text")
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "recall: accuracy" in printed and "nystrom_pinv" in printed

    more = script.main([*SMALL, *folder, "--lengths", "12", "14", "--mixers", "pooling"])
    assert more[: len(rows)] == rows and len(more) == len(rows) + 2
    with pytest.raises(SystemExit, match=r"steps"):
        script.main([*SMALL, *folder, "--steps", "2"])


def test_the_recall_task_asks_for_the_value_of_a_key(script):
    batch = script.recall_batch(20, 50, torch.Generator().manual_seed(0))
    values = script.VALUES
    for row, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(divmod(token, values) for token in row[:4])
        assert len(pairs) == 4 and set(row[4:-1]) == {script.FILLER}
        assert pairs[row[-1] - script.KEYS * values] == label
