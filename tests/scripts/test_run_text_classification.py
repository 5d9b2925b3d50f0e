"""The training script of text classifiers: ListOps, texts of one's own, resuming, refusals."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests.batteries.scripts import loaded_script


pytest.importorskip("datasets")

COMMON = ["--disable_tqdm", "true", "--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "16"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_text_classification") as module:
        yield module


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    """Two classes that differ in the first letter."""
    folder = tmp_path_factory.mktemp("texts")
    for label, letter in (("early", "a"), ("late", "z")):
        (folder / label).mkdir()
        for index in range(40):
            (folder / label / f"{index}.txt").write_text(f"{letter} text number {index}", encoding="utf-8")
    return folder


def test_listops_with_a_deep_and_a_wide_model(script, tmp_path):
    arguments = ["--output_dir", str(tmp_path / "out"), "--listops_samples", "64", "--max_steps", "2", *COMMON]
    results = script.main(arguments)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"4x2", "1x8"}
    assert results["4x2"]["parameters"] > results["1x8"]["parameters"]
    assert results["4x2"]["folded ms"] is None and results["1x8"]["folded ms"] > 0
    folder = tmp_path / "out" / "1x8"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.num_labels == 10 and model.config.vocab_size == len(tokenizer) == 17
    assert "## The mechanism" in (folder / "README.md").read_text()


def test_a_folder_of_texts_is_learned_and_resumed(script, text_folder, tmp_path):
    arguments = ["--dataset_name", str(text_folder), "--output_dir", str(tmp_path / "out"), "--num_layers", "1"]
    arguments += ["--max_length", "32", "--save_strategy", "steps", "--save_steps", "10", *COMMON]
    script.main([*arguments, "--max_steps", "10"])
    with pytest.raises(SystemExit, match=r"is not empty: .* `--resume_from_checkpoint last` continues it"):
        script.main([*arguments, "--max_steps", "40"])
    results = script.main([*arguments, "--max_steps", "40", "--resume_from_checkpoint", "last"])
    state = json.loads((tmp_path / "out" / "1x8" / "checkpoint-40" / "trainer_state.json").read_text())
    assert state["global_step"] == 40
    assert results["1x8"]["accuracy"] == 1
    pipe = pipeline("text-classification", model=str(tmp_path / "out" / "1x8"))
    assert [pipe(text)[0]["label"] for text in ("a text number 3", "z text number 3")] == ["early", "late"]


def test_a_file_says_how_many_texts_were_cut(script, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    rows = [{"review": "x" * length, "stars": length % 3} for length in range(1, 41)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = [
        "--dataset_name",
        str(path),
        "--text_column",
        "review",
        "--label_column",
        "stars",
        "--max_length",
        "20",
    ]
    script.main([*arguments, "--output_dir", str(tmp_path / "out"), "--num_layers", "1", "--max_steps", "1", *COMMON])
    output = capsys.readouterr().out
    cut = [int(line.split(": ")[1].split(" ")[0]) for line in output.splitlines() if "were truncated" in line]
    assert sum(cut) == 20
    with pytest.raises(SystemExit, match="no column 'text', only review, stars"):
        script.main(["--dataset_name", str(path), "--output_dir", str(tmp_path / "other"), *COMMON])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "huge"], "--variant huge is not one of byte_imdb_4x4"),
        (["--attention_type", "reformer"], "--attention_type reformer is not one of softmax"),
        (["--num_layers", "3"], "8 heads cannot be distributed evenly over num_layers=3"),
        (["--model_name_or_path", "x", "--num_layers", "1"], "cannot be used with the weights"),
        (["--push_to_hub"], "needs a single model"),
        (["--validation_split_percentage", "0"], "--validation_split_percentage=0 is out of range"),
        (["--resume_from_checkpoint", "x"], "must be `last`"),
        (["--resume_from_checkpoint", "last"], "no checkpoint in .* to resume from"),
        (["--resume_from_checkpoint", "last", "--overwrite_output_dir"], "pass only one of them"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(script, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(["--output_dir", str(tmp_path / "out"), "--listops_samples", "20", *COMMON, *arguments])
