"""The training script of embedders: it learns, resumes, and saves what sentence-transformers loads."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.batteries.scripts import loaded_script
from tests.batteries.text import byte_tokenizer, llama


pytest.importorskip("datasets")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_embedding") as module:
        yield module


@pytest.fixture(scope="module")
def main(script):
    """The main function of the script, called in this process with arguments of any type."""
    return lambda *arguments: script.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list:
    """A tiny base, and words whose positive is the word in capital letters."""
    folder = tmp_path_factory.mktemp("embedding")
    llama(num_hidden_layers=2).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "data").mkdir()
    words = [left + right for left in "abcdefghijkl" for right in "mnopqrstuvwx"]
    rows = [json.dumps({"query": word, "positive": word.upper()}) for word in words]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    return [
        *("--model_name_or_path", folder / "base", "--dataset_name", folder / "data", "--num_held_out", 20),
        *("--num_latents", 2, "--num_pooling_heads", 2, "--pooling_head_dim", 4, "--max_length", 8),
        *(
            "--learning_rate",
            "1e-2",
            "--lora_rank",
            4,
            "--use_cpu",
            "true",
            "--report_to",
            "none",
            "--disable_tqdm",
            "true",
        ),
    ]


def test_it_learns_resumes_and_saves(main, arguments, tmp_path):
    whole = main(*arguments, "--design", 5, "--max_steps", 40, "--output_dir", tmp_path / "whole", "--save_steps", 20)
    assert whole["after_mrr"] > 1.4 * whole["before_mrr"]
    # The same run, stopped after half its steps.
    part = (*arguments, "--design", 5, "--max_steps", 40, "--output_dir", tmp_path / "part")
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "part" / "checkpoint-20")
    with pytest.raises(SystemExit, match="is not empty"):
        main(*part)
    resumed = main(*part, "--resume_from_checkpoint", "last")
    assert resumed == pytest.approx(whole, abs=1e-4)
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in ("whole", "part"))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "whole" / "modules.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("ab")["input_ids"][-1] == first.config.eos_token_id


def test_lora_is_on_the_highest_layers(script):
    from hf_attn import PoolingAttentionModel

    base = llama(num_hidden_layers=3)
    for count, expected in ((2, {"1", "2"}), (9, {"0", "1", "2"})):
        model = PoolingAttentionModel.from_base(base, design=1)
        names = [name for name, _ in script.add_lora(model, 2, count).named_parameters()]
        assert {name.split(".layers.")[1][0] for name in names if "lora_A" in name} == expected


def test_designs_are_compared_over_tasks(main, arguments, tmp_path, capsys):
    from datasets import load_dataset

    rows = load_dataset(str(arguments[3]), split="train").to_list()
    (tmp_path / "data").mkdir()
    lines = [json.dumps({**row, "task": row["query"][0]}) for row in rows]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    shared = [*map(str, arguments), "--dataset_name", str(tmp_path / "data"), "--max_steps", "2"]
    with loaded_script("compare_embedders") as compare:
        own = ["--output_dir", str(tmp_path / "out"), "--designs", "1", "5", "--seeds", "0"]
        result = compare.main([*own, "--", *shared])
        assert len(result["scores"]["design 1"]) == len(result["tasks"]) > 2
        assert [test["first"] for test in result["tests"]] == ["design 1"]
        assert "design 1 - design 5" in capsys.readouterr().out
        assert (tmp_path / "out" / "comparison.png").stat().st_size > 0
        with pytest.raises(SystemExit, match="other settings"):
            compare.main([*own, "--", *shared, "--scale", "10"])
