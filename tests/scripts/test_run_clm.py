"""The training script of the causal language models: it learns, resumes, saves, pushes and refuses."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline

from hf_attn.catalog import families
from hf_attn.patching.sigma_reparam import SigmaReparamLinear
from tests.batteries.families import tiny_config
from tests.batteries.hub_server import HubServer
from tests.batteries.scripts import SCRIPTS, loaded_script


pytest.importorskip("datasets")

SCRIPT = SCRIPTS / "run_clm.py"
CAUSAL = [family.model_type for family in families() if "AutoModelForCausalLM" in family.models]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def run_clm():
    with loaded_script("run_clm") as module:
        yield module


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Words in a fixed order: easy to predict for a model that uses the context, but not without it."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("one two three four five six seven " * 700, encoding="utf-8")
    return path


def common_arguments(text_file: Path, output_dir: Path) -> list[str]:
    return [
        *("--train_file", str(text_file), "--output_dir", str(output_dir)),
        *("--block_size", "32", "--vocab_size", "270", "--learning_rate", "1e-2"),
        *("--disable_tqdm", "true", "--use_cpu", "true", "--report_to", "none"),
    ]


def small_arguments(model_type: str, text_file: Path, output_dir: Path) -> list[str]:
    overrides = [f"{name}={value}" for name, value in SIZES.items()]
    model = ["--model_type", model_type, "--config_overrides", *overrides]
    return [*model, *common_arguments(text_file, output_dir)]


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_model_from_scratch_learns(run_clm, model_type, text_file, tmp_path):
    tiny_config(model_type).save_pretrained(tmp_path / "config")
    arguments = ["--config_name", str(tmp_path / "config"), *common_arguments(text_file, tmp_path / "out")]
    output = tmp_path / "out"
    metrics = run_clm.main([*arguments, "--max_steps", "60"])
    assert metrics["eval_loss"] < 0.5 * metrics["eval_unigram_entropy"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.model_type == model_type
    assert model.config.vocab_size == len(tokenizer)
    written = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
        "one two three", max_new_tokens=4, do_sample=False
    )
    assert written[0]["generated_text"].startswith("one two three")
    card = (output / "README.md").read_text()
    assert type(model).__name__ in card
    assert "Evaluation" in card

    # The saved model is the one that was evaluated.
    again = run_clm.main(
        [
            *("--model_name_or_path", str(output), "--train_file", str(text_file), "--block_size", "32"),
            *("--output_dir", str(tmp_path / "again"), "--do_eval", "--disable_tqdm", "true", "--use_cpu", "true"),
        ]
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(run_clm, text_file, tmp_path):
    schedule = ["--max_steps", "6", "--save_steps", "3", "--gradient_accumulation_steps", "2"]
    schedule += ["--per_device_train_batch_size", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_clm.main([*small_arguments("sigmoid_attention", text_file, whole), *schedule])
    shutil.copytree(whole / "checkpoint-3", killed / "checkpoint-3")
    with pytest.raises(SystemExit, match=r"is not empty.*`--resume_from_checkpoint last` continues"):
        run_clm.main([*small_arguments("sigmoid_attention", text_file, killed), *schedule])
    run_clm.main(
        [*small_arguments("sigmoid_attention", text_file, killed), *schedule, "--resume_from_checkpoint", "last"]
    )
    expected, weights = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, killed))
    start = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-3").state_dict()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
        assert not torch.equal(start[name], weight), name
    assert (killed / "tokenizer.json").read_text() == (whole / "tokenizer.json").read_text()


def test_published_variants_and_configuration_files_are_understood(run_clm, tmp_path):
    tokenizer = run_clm.train_tokenizer(["some text"], 300)
    data_args = run_clm.DataArguments(block_size=64)
    model_args = run_clm.ModelArguments(
        model_type="sigmoid_attention", variant="gala_85m", config_overrides=["num_hidden_layers=3", "hidden_act=gelu"]
    )
    config = run_clm.make_config(model_args, data_args, tokenizer)
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_act) == (768, 3, "gelu")
    assert config.max_position_embeddings == 4096
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (len(tokenizer), 0, 1)

    config.save_pretrained(tmp_path)
    model_args = run_clm.ModelArguments(config_name=str(tmp_path), config_overrides=["hidden_size=384"])
    again = run_clm.make_config(model_args, data_args, tokenizer)
    assert (type(again), again.hidden_size, again.num_hidden_layers) == (type(config), 384, 3)

    # A model from scratch is trained on sequences of this length, from which its bias is derived.
    model_args = run_clm.ModelArguments(model_type="sigmoid_attention")
    assert run_clm.make_config(model_args, data_args, tokenizer).sigmoid_bias == -math.log(64)
    model_args = run_clm.ModelArguments(model_type="echo_att", config_overrides=["shared_layers=[2,3]"])
    assert run_clm.make_config(model_args, data_args, tokenizer).shared_layers == [2, 3]


def test_the_attention_function_reaches_the_model(run_clm, text_file, tmp_path):
    run_clm.main(
        [
            *small_arguments("sigmoid_attention", text_file, tmp_path / "out"),
            *("--max_steps", "1", "--attn_implementation", "sigmoid_eager"),
        ]
    )
    with pytest.raises(ValueError, match="computes sigmoid attention"):
        run_clm.main(
            [
                *small_arguments("sigmoid_attention", text_file, tmp_path / "other"),
                *("--max_steps", "1", "--attn_implementation", "sdpa"),
            ]
        )


@pytest.mark.parametrize("init", ["preserve", "unit"])
def test_a_reparametrised_model_learns_and_is_trained_further(run_clm, init, text_file, tmp_path):
    arguments = [*small_arguments("sigmoid_attention", text_file, tmp_path / "out"), "--sigma_reparam", init]
    metrics = run_clm.main([*arguments, "--max_steps", "80"])
    assert metrics["eval_loss"] < 0.5 * metrics["eval_unigram_entropy"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, SigmaReparamLinear)]
    assert len(layers) == 2 * 7 + (not model.config.tie_word_embeddings)

    further = ["--model_name_or_path", str(tmp_path / "out"), *common_arguments(text_file, tmp_path / "further")]
    further.append("--overwrite_output_dir")
    assert run_clm.main([*further, "--do_eval"])["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    run_clm.main([*further, "--max_steps", "1", "--learning_rate", "1e-3"])
    with pytest.raises(SystemExit, match="is already reparametrised"):
        run_clm.main([*further, "--sigma_reparam", init])


def test_a_checkpoint_is_reparametrised_without_a_change_of_its_loss(run_clm, text_file, tmp_path):
    run_clm.main([*small_arguments("sigmoid_attention", text_file, tmp_path / "out"), "--max_steps", "5"])
    plain, reparametrised = (
        run_clm.main(
            [
                *("--model_name_or_path", str(tmp_path / "out"), *common_arguments(text_file, tmp_path / name)),
                *("--do_eval", *further),
            ]
        )
        for name, further in (("plain", []), ("reparametrised", ["--sigma_reparam", "preserve"]))
    )
    assert reparametrised["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("with_validation", [False, True])
def test_a_dataset_folder_is_read(run_clm, with_validation, tmp_path, monkeypatch):
    monkeypatch.setattr(run_clm.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test", *(["validation"] if with_validation else [])):
        rows = [{"body": f"{split} {index} " * 9, "title": index} for index in range(20)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data_args = run_clm.DataArguments(dataset_name=str(folder), text_column="body", validation_split_percentage=25)
    documents = run_clm.load_documents(data_args)
    assert set(documents) == ({"train", "validation"} if with_validation else {"train"})
    assert documents["train"]["text"][3] == "train 3 " * 9

    tokenizer = run_clm.train_tokenizer(documents["train"]["text"], 300)
    blocks = run_clm.make_blocks(documents, tokenizer, data_args, 16)
    held_out = tokenizer.decode([token for block in blocks["validation"]["input_ids"] for token in block])
    if with_validation:
        assert held_out.startswith("validation 0 validation 0")
    else:
        assert "train 19 train 19" in held_out
        total = len(blocks["train"]) + len(blocks["validation"])
        assert len(blocks["validation"]) == math.ceil(total * 0.25)

    with pytest.raises(SystemExit, match="has no column 'text'; choose --text_column from body, title"):
        run_clm.load_documents(run_clm.DataArguments(dataset_name=str(folder)))
    (folder / "train.jsonl").unlink()
    (folder / "validation.jsonl").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="has no split 'train', only test"):
        run_clm.load_documents(data_args)


def test_the_tokenizer_encodes_any_text(run_clm):
    documents = run_clm.datasets.Dataset.from_dict({"text": ["plain English words"]})
    tokenizer = run_clm.train_tokenizer(documents["text"], 260)
    text = "Größe 寸法 🙂\n\ttab"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_sequences_are_the_text_without_gaps(run_clm):
    documents = run_clm.datasets.DatasetDict(
        {
            split: run_clm.datasets.Dataset.from_dict({"text": texts})
            for split, texts in (("train", ["abcdef" * 5, "xyz" * 10]), ("validation", ["abc" * 10]))
        }
    )
    tokenizer = run_clm.train_tokenizer(documents["train"]["text"], 258)
    blocks = run_clm.make_blocks(documents, tokenizer, run_clm.DataArguments(max_train_samples=5), 8)
    end = tokenizer.eos_token
    joined = tokenizer.decode([token for block in blocks["train"]["input_ids"] for token in block])
    assert joined == ("abcdef" * 5 + end + "xyz" * 10 + end)[: len(joined)]
    assert blocks["train"]["labels"] == blocks["train"]["input_ids"]
    assert (len(blocks["train"]), len(blocks["validation"])) == (5, 3)


def test_unigram_entropy_is_that_of_the_frequencies(run_clm):
    ids = [0] * 8 + [1] * 4 + [2] * 2 + [3] * 2
    random.Random(0).shuffle(ids)
    blocks = run_clm.datasets.Dataset.from_dict({"input_ids": [ids[:8], ids[8:]]})
    assert run_clm.unigram_entropy(blocks) == pytest.approx(1.75 * math.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass exactly one of --model_name_or_path, --model_type, --config_name"),
        (["--model_type", "sigmoid_attention", "--config_name", "x"], "pass exactly one of"),
        (["--model_type", "llama"], "--model_type llama is not one of sigmoid_attention"),
        (["--config_name", "x", "--variant", "gala_85m"], "--variant needs --model_type"),
        (
            ["--model_name_or_path", "x", "--config_overrides", "a=1"],
            "--config_overrides cannot be used with the weights",
        ),
        (["--model_type", "echo_att", "--train_file", "missing.txt"], "--train_file missing.txt does not exist"),
        (["--model_type", "echo_att", "--validation_file", "x.txt"], "--validation_file needs a --train_file"),
        (["--model_type", "echo_att", "--dataset_name", "x", "--train_file", "y"], "either --dataset_name or files"),
        (
            ["--model_type", "echo_att", "--validation_split_percentage", "100"],
            "=100 is out of range: it must be above 0 and below 100",
        ),
        (["--model_type", "echo_att", "--resume_from_checkpoint", "last"], "there is no checkpoint in"),
        (["--model_type", "echo_att", "--resume_from_checkpoint", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_contradictory_arguments_are_refused(run_clm, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_clm.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_overrides", "hiden_size=3"], "has no field 'hiden_size'; did you mean hidden_size?"),
        (["--config_overrides", "hidden_size"], "takes name=value, got 'hidden_size'"),
        (["--block_size", "40000"], "the train text has 0 sequences of 40000 tokens, but at least 2 are needed"),
        (["--config_overrides", "max_position_embeddings=16"], "exceeds the 16 positions of the model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(run_clm, arguments, message, text_file, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_clm.main([*small_arguments("sigmoid_attention", text_file, tmp_path), *arguments])


def test_an_unknown_variant_lists_the_known_ones(run_clm, text_file, tmp_path):
    with pytest.raises(SystemExit, match="has no variant 'gala_3b'; its variants: gala_85m, gala_1b, gala_7b"):
        run_clm.main([*small_arguments("sigmoid_attention", text_file, tmp_path), "--variant", "gala_3b"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run_clm, text_file, tmp_path):
    config = LlamaConfig(**SIZES, vocab_size=100, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    documents = run_clm.datasets.Dataset.from_dict({"text": ["text"]})
    run_clm.train_tokenizer(documents["text"], 260).save_pretrained(tmp_path / "tokenizer")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--tokenizer_name", str(tmp_path / "tokenizer")]
    with pytest.raises(SystemExit, match=r"the tokenizer has \d+ tokens, but the model only 100"):
        run_clm.main([*arguments, "--train_file", str(text_file), "--output_dir", str(tmp_path / "out")])


def test_a_full_folder_is_overwritten_only_when_asked(run_clm, text_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [*small_arguments("sigmoid_attention", text_file, tmp_path), "--max_steps", "1"]
    for more in ([], ["--overwrite_output_dir"]):
        with pytest.raises(SystemExit, match="is not empty and contains no run of hf_attn"):
            run_clm.main([*arguments, *more])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    arguments = [*small_arguments("sigmoid_attention", text_file, tmp_path / "run"), "--max_steps", "1"]
    run_clm.main(arguments)
    with pytest.raises(SystemExit, match=r"contains an earlier run.*`--overwrite_output_dir` starts a new run"):
        run_clm.main(arguments)
    run_clm.main([*arguments, "--overwrite_output_dir"])
    assert all((tmp_path / name / "model.safetensors").exists() for name in ("run", "run.earlier-1"))


def test_the_pushed_repository_loads_without_importing_the_package(text_file, tmp_path):
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        arguments = [*small_arguments("sigmoid_attention", text_file, tmp_path / "out"), "--max_steps", "2"]
        arguments += ["--push_to_hub", "--hub_model_id", "tester/small-sigmoid"]
        run = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        files = hub.repositories["tester/small-sigmoid"]
        assert {"config.json", "modeling_hf_attn.py", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
        card = files["README.md"].decode()
        assert "SigmoidAttentionForCausalLM" in card
        assert "2409.04431" in card
        load = (
            "from transformers import AutoModelForCausalLM as A\n"
            "print(type(A.from_pretrained('tester/small-sigmoid', trust_remote_code=True)).__name__)"
        )
        run = subprocess.run(
            [sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == "SigmoidAttentionForCausalLM"
        assert hub.unknown == []


@pytest.mark.slow
def test_two_processes_train_as_one(run_clm, text_file, tmp_path):
    """Two processes with half the batch each end with the weights of one."""
    arguments = ["--max_steps", "3", "--lr_scheduler_type", "constant", "--optim", "sgd", "--save_strategy", "no"]
    run_clm.main(
        [
            *small_arguments("sigmoid_attention", text_file, tmp_path / "one"),
            *(*arguments, "--per_device_train_batch_size", "8"),
        ]
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [*small_arguments("sigmoid_attention", text_file, tmp_path / "two"), *arguments]
    command += ["--per_device_train_batch_size", "4"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)
