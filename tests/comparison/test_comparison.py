"""`hf-attn compare` in miniature: entries, tasks and output files."""

import csv
import json
import math

import pytest
import torch
from PIL import Image

from hf_attn.cli import main
from hf_attn.comparison import run as comparison
from hf_attn.comparison.data import COPIED, IGNORED, NUM_PAIRS, Corpus
from hf_attn.comparison.entries import Shape, default_entries, make_config, make_model
from hf_attn.comparison.measure import measure
from hf_attn.comparison.report import COLUMNS, summarize, table


SHAPE = Shape(
    vocab_size=200,
    max_position_embeddings=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.fixture
def corpus():
    tokens = torch.arange(3000) % 100
    return Corpus(tokens, tokens[:2500], first_symbol=120)


def test_every_causal_family_makes_a_model_of_the_shape():
    assert {"llama", "echo_att", "sigmoid_attention", "landmark"} <= set(default_entries())
    for entry in default_entries():
        model = make_model(entry, SHAPE)
        assert model.config.vocab_size == 200 and model.config.num_hidden_layers == 4, entry


@pytest.mark.parametrize("entry", default_entries())
def test_every_model_begins_near_the_loss_of_a_uniform_guess(entry):
    torch.manual_seed(0)
    input_ids = torch.randint(SHAPE.vocab_size - 1, (4, 64))
    loss = make_model(entry, SHAPE)(input_ids=input_ids, labels=input_ids).loss
    assert loss < 1.25 * math.log(SHAPE.vocab_size)


def test_a_family_is_compared_with_its_mechanism():
    kinds = make_config("deconstructing_attention", SHAPE)[0].layer_kinds
    assert list(kinds) == ["taylor_joint", "standard"] * 2
    assert make_config("token_mixer", SHAPE)[0].mixer != "softmax"


def test_fields_and_attention_functions_go_into_the_name():
    config, attention = make_config("llama+sigmoid:rms_norm_eps=0.1;hidden_act=gelu", SHAPE)
    assert (attention, config.hidden_act) == ("sigmoid", "gelu")
    assert make_config("echo_att:shared_layers=[1,2]", SHAPE)[0].shared_layers == [1, 2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mamba", "Families: llama"),
        ("llama:hidden_sise=3", "has no field hidden_sise"),
        ("llama:hidden_act", "does not set a field"),
    ],
)
def test_entries_that_make_no_sense(entry, message):
    with pytest.raises(ValueError, match=message):
        make_config(entry, SHAPE)


@pytest.mark.parametrize("task", ["recall", "copying"])
def test_answers_of_a_task_are_in_the_sequence(corpus, task):
    batch = getattr(corpus, task)(3, 64, torch.Generator().manual_seed(0))
    asked = batch["labels"] != IGNORED
    assert asked.sum() == 3 * (NUM_PAIRS if task == "recall" else COPIED)
    for ids, row in zip(batch["input_ids"], asked, strict=True):
        for place in row.nonzero().flatten():
            # The answer follows for teacher forcing, and occurs earlier in the sequence after the same token.
            earlier = ids[: place - 1] if task == "recall" else ids[: COPIED + 1]
            assert ids[place] in earlier


def test_training_measures_every_column(corpus, tmp_path):
    from safetensors.torch import save_file

    save_file({"train": corpus.train, "test": corpus.test.clone()}, tmp_path / "corpus.safetensors")
    shape = {name: getattr(SHAPE, name) for name in Shape.__dataclass_fields__}
    job = {"seed": 0, "steps": 2, "batch_size": 4, "length": 64, "learning_rate": 1e-3, "shape": shape}
    job |= {"corpus": str(tmp_path / "corpus.safetensors"), "first_symbol": corpus.first_symbol}
    results = [measure({**job, "entry": entry}) for entry in ("llama", "landmark")]
    rows = summarize(results, "llama")
    for row in rows:
        assert set(COLUMNS) <= set(row) and row["error"] == ""
    # keys and values of 4 layers, 32 numbers each, in float32
    assert rows[0]["cache_bytes_a_token"] == 4 * 2 * 32 * 4
    assert rows[0]["parameters_ratio"] == 1.0
    assert results[0]["losses"] != results[1]["losses"]


def test_a_failure_is_a_row():
    row = {name: 1.0 for name in COLUMNS if name not in ("parameters_ratio", "loss_spread")} | {"entry": "llama"}
    rows = summarize([row, {"entry": "echo_att", "seed": 0, "error": "ValueError: no"}], "llama")
    assert "| `echo_att` | failed: ValueError: no |" in table(rows)


@pytest.mark.slow
def test_the_command_continues_and_survives_a_family_that_fails(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away. " * 2000)
    monkeypatch.setattr(comparison, "LENGTH", 32)
    output = tmp_path / "out"
    # A layer that does not exist is detected only when the model is created.
    families = ["llama", "llama+no_such_attention"]
    arguments = ["compare", "--families", *families, "--minutes", "0.001", "--seeds", "1", "--data", str(text)]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "failed: " in capsys.readouterr().out
    result = output / "results" / "00-0.json"
    written = result.stat().st_mtime_ns
    assert main([*arguments, "--output", str(output)]) == 0
    assert result.stat().st_mtime_ns == written, "what was measured is not measured again"
    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [row["entry"] for row in rows] == families and rows[1]["error"]
    assert json.loads((output / "comparison.json").read_text())["rows"][0]["entry"] == "llama"
    for plot in ("losses.png", "quality.png"):
        assert min(Image.open(output / plot).size) > 300


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    assert main(["compare", "--families", "mamba", "--output", str(tmp_path / "out")]) == 2
    assert "There is no entry 'mamba'" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["compare", "--output", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    few, bytes_file = tmp_path / "few.txt", tmp_path / "bytes.txt"
    few.write_text("a few words " * 40)
    bytes_file.write_bytes(b"\x87" * 100)
    for arguments, message in (
        (["--data", str(tmp_path / "nowhere.txt")], "There is no file"),
        (["--data", str(bytes_file)], "bytes.txt is not UTF-8 text"),
        (["--data", str(few)], "text has"),
        (["--minutes", "nan"], "minutes must be above 0"),
    ):
        assert main(["compare", *arguments, "--families", "llama", "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    # An immediate failure does not prevent another attempt.
    assert not (tmp_path / "out" / "_hf_attn_run.json").exists()
