"""scripts/train_retrieval.py with models that learn nothing."""

import json

import pytest

from tests.batteries.scripts import loaded_script


@pytest.fixture(scope="module")
def script():
    with loaded_script("train_retrieval") as module:
        yield module


def test_train_evaluate_and_continue(script, tmp_path, capsys):
    output = tmp_path / "run"
    command = f"--output_dir {output} --seeds 0 1 --texts 1 --steps 2 --hidden_size 16 --num_tokens 128".split()
    script.main([*command, "--lengths", "64", "96"])
    printed = capsys.readouterr().out
    for expected in ("landmark, seed 1, 96 tokens: ", "llama: correct answers by length", " ± "):
        assert expected in printed
    results = json.loads((output / "results.json").read_text())["models"]
    assert list(results) == ["landmark", "llama"] and list(results["llama"]) == ["64", "96"]
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    script.main([*command, "--lengths", "64", "--top_k", "1"])
    again = json.loads((output / "results.json").read_text())
    assert again["top_k"] == 1 and again["models"]["llama"]["64"] == results["llama"]["64"]
    with pytest.raises(SystemExit, match=r"train_retrieval\.py: error"):
        script.main([*command, "--learning_rate", "1"])
