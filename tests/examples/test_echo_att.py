"""The EchoAtt example end to end on a tiny base."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_attn.examples import echo_att as module
from hf_attn.examples.assets import load_texts
from hf_attn.examples.echo_att import costs, echo_att
from hf_attn.training.output_folder import RECORD, OutputFolderError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(load_texts("test"), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setattr(module, "TRAIN_LENGTH", 32)
    monkeypatch.setattr(module, "TEST_LENGTH", 48)
    monkeypatch.setattr(module, "SIMILARITY_SAMPLES", 2)
    monkeypatch.setattr(module, "TEST_SAMPLES", 4)


def run(base, output, **settings):
    return echo_att(output, **{"steps": 12, "num_shared": 2, "base": base, "learning_rate": 3e-3, **settings})


def test_from_the_base_to_a_folder_for_the_hub(base, tmp_path, capsys):
    results = run(base, tmp_path)
    perplexity, cost = results["perplexity"], results["cost"]
    assert perplexity["distilled student"] < perplexity["untrained student"]
    teacher, student = cost["teacher"], cost["distilled student"]
    # Two layers without queries (32 x 32) and keys (16 x 32); their part of the cache is 2 heads of 8 floats.
    assert teacher["parameters"] - student["parameters"] == 2 * (32 * 32 + 16 * 32)
    assert teacher["cache_bytes"] - student["cache_bytes"] == 2 * 2 * 8 * 4
    assert student["tokens_per_second"] > 0

    output = capsys.readouterr().out
    for expected in ("with the layer before", "Stage 1: 12 steps", "Stage 2: 3 steps", "KV-cache bytes per token"):
        assert expected in output
    assert (tmp_path / "attention_similarity.png").read_bytes().startswith(b"\x89PNG")
    assert results["sample"].startswith(module.PROMPT)

    folder = tmp_path / "model"
    assert {"README.md", "config.json", "model.safetensors", "modeling_hf_attn.py", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert f"| Perplexity of the distilled student | {perplexity['distilled student']:.6g} |" in card
    assert "| distillation steps | 12 |" in card
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "EchoAttForCausalLM"
    assert f"`hf upload YOUR-NAME/MODEL {folder}`" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        RECORD,
        "attention_similarity.png",
        "distilled",
        "model",
        "refined",
        "results.json",
    ]


def test_a_second_run_redoes_nothing(base, tmp_path, monkeypatch):
    first = run(base, tmp_path)

    def forbidden(*arguments, **kwargs):
        raise AssertionError("this was there already")

    for name in ("attention_similarity", "train_stage", "costs", "pipeline"):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(module.EchoAttForCausalLM, "from_base", forbidden)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", forbidden)
    assert run(base, tmp_path) == first


def test_an_interrupted_run_ends_like_another(base, tmp_path, monkeypatch):
    whole = run(base, tmp_path / "whole")

    def interrupted(trainer, folder):
        if folder.name == "refined":
            raise KeyboardInterrupt
        return train_stage(trainer, folder)

    train_stage = module.train_stage
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train_stage", interrupted)
        run(base, tmp_path / "resumed")
    resumed = run(base, tmp_path / "resumed")
    assert resumed["perplexity"] == whole["perplexity"]
    assert resumed["sample"] == whole["sample"]


def test_other_settings_and_foreign_folders_are_refused(base, tmp_path):
    settings = {"example": "echo_att", "base": str(base), "steps": 7, "num_shared": 2, "learning_rate": 3e-3}
    (tmp_path / RECORD).write_text(json.dumps({"command": "hf-attn quickstart", "settings": settings}))
    with pytest.raises(OutputFolderError, match=r"other settings: steps \(7 -> 12\)"):
        run(base, tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(OutputFolderError, match="contains no run of hf_attn"):
        run(base, tmp_path / "foreign")


def test_costs_of_a_model():
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    result = costs({"model": model.to(torch.bfloat16)}, context=4, new_tokens=2, rounds=1)["model"]
    assert result["parameters"] == model.num_parameters()
    assert result["cache_bytes"] == 2 * 2 * 16 * 2
