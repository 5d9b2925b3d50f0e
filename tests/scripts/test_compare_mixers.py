"""`scripts/compare_mixers.py`: every mixer on both tasks, resumed, and refused for other settings."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hf_attn.mixers import MIXERS, causal_mixers


pytest.importorskip("matplotlib", reason="the script draws its results")

SPEC = importlib.util.spec_from_file_location(
    "compare_mixers", Path(__file__).parents[2] / "scripts" / "compare_mixers.py"
)
compare_mixers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_mixers)
SMALL = ["--steps", "1", "--batch_size", "2", "--hidden_size", "8", "--layers", "1", "--lengths", "12"]


def test_all_mixers_run_and_a_run_is_continued(tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "out")]
    rows = compare_mixers.main([*SMALL, *folder])
    found = [(row["task"], row["mixer"]) for row in rows]
    assert found == [("recall", name) for name in MIXERS] + [("text", name) for name in causal_mixers()]
    assert all(0 <= row["quality"] <= 1 for row in rows if row["task"] == "recall")
    assert all(6 < row["quality"] < 10 for row in rows if row["task"] == "text")
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "recall: accuracy" in printed and "nystrom_pinv" in printed

    more = compare_mixers.main([*SMALL, *folder, "--lengths", "12", "14", "--mixers", "pooling"])
    assert more[: len(rows)] == rows and len(more) == len(rows) + 2
    with pytest.raises(SystemExit, match=r"steps"):
        compare_mixers.main([*SMALL, *folder, "--steps", "2"])


def test_the_recall_task_asks_for_the_value_of_a_key():
    batch = compare_mixers.recall_batch(20, 50, torch.Generator().manual_seed(0))
    values = compare_mixers.VALUES
    for row, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(divmod(token, values) for token in row[:4])
        assert len(pairs) == 4 and set(row[4:-1]) == {compare_mixers.FILLER}
        assert pairs[row[-1] - compare_mixers.KEYS * values] == label
