"""scripts/run_landmark.py on a tiny base."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attn.modeling.landmark.modeling_landmark import LANDMARK_TOKEN, LandmarkForCausalLM
from tests.batteries.scripts import SCRIPTS, loaded_script
from tests.batteries.text import byte_tokenizer, llama


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_landmark") as module:
        yield module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    byte_tokenizer().save_pretrained(folder)
    llama(num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Blocks are read when their landmarks are scored highest. " * 30)
    return path


def arguments(base, text, output, *more):
    command = f"--model_name_or_path {base} --train_file {text} --validation_file {text} --output_dir {output} "
    command += "--per_device_train_batch_size 8 --report_to none --use_cpu true "
    command += (
        "--disable_tqdm true --perplexity_lengths 16 64 --passkey_lengths 320 --passkey_depths 0 1 --cache_top_k 2 "
    )
    command += "--passkey_trials 1 --save_strategy no"
    blocks = [] if "--model_name_or_path" in more else ["--mem_freq", "7", "--train_context_length", "64"]
    return [*command.split(), *blocks, *map(str, more)]


def test_train_evaluate_and_evaluate_again(script, base, text, tmp_path, capsys):
    output = tmp_path / "run"
    script.main(arguments(base, text, output, "--max_steps", 60, "--learning_rate", 1e-2))
    printed = capsys.readouterr().out
    assert "30 sequences of 56 tokens with a landmark after every 7" in printed
    for expected in ("Perplexity of the held-out text", "Pass-key test of the base", "Pass-key test of the landmark"):
        assert expected in printed
    assert (output / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert {"README.md", "modeling_hf_attn.py", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert isinstance(model, LandmarkForCausalLM)
    assert model.config.landmark_token_id == tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN) == 257
    before, after = (json.loads((output / f"evaluation_{name}.json").read_text()) for name in ("base", "landmark"))
    assert after["perplexity"]["64"] < 0.5 * before["perplexity"]["64"]
    assert [(answer["num_tokens"], answer["depth"]) for answer in after["passkey"]] == [
        (320, 0.0),
        (320, 1.0),
    ]

    further = ["--do_eval", "--model_name_or_path", output, "--evaluate", "landmark"]
    script.main(arguments(base, text, output, *further, "--perplexity_lengths", 16, 64, 9999))
    printed = capsys.readouterr().out
    assert "The held-out text has 1,711 tokens, so perplexity is not measured for longer contexts." in printed
    again = json.loads((output / "evaluation_landmark.json").read_text())["perplexity"]
    assert again["16"] == pytest.approx(after["perplexity"]["16"])
    assert "Pass-key test of the base" in printed


def test_training_ends_at_its_time(script, base, text, tmp_path):
    script.main(arguments(base, text, tmp_path / "run", "--do_train", "--max_steps", 50, "--max_minutes", 0))
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["steps"] == 1


def test_a_landmark_model_is_trained_further(script, base, text, tmp_path):
    for folder, more in (("first", ()), ("second", ("--model_name_or_path", tmp_path / "first"))):
        script.main(arguments(base, text, tmp_path / folder, "--do_train", "--max_steps", 2, *more))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.config.mem_freq == second.config.mem_freq == 7
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mem_freq", 63], "is too short for two blocks of 64 tokens"),
        (["--dataset_name", "x"], "either --dataset_name or --train_file"),
        (["--validation_file", "nowhere.txt"], "--validation_file nowhere.txt does not exist"),
        (["--evaluate", "other"], "--evaluate must be base or landmark, got other"),
        (["--retrieval", "nearest"], "--retrieval nearest is not one of per_token_and_head"),
        (["--passkey_trials", 1, 2], "--passkey_trials must be one number, or one per value"),
        (["--do_eval"], "needs a landmark model as --model_name_or_path"),
    ],
)
def test_contradictory_arguments_are_refused(script, base, text, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments(base, text, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_never_trained_into(script, base, text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite_output_dir"]):
        with pytest.raises(SystemExit, match="is not empty and contains no run of hf_attn"):
            script.main(arguments(base, text, tmp_path, "--max_steps", 1, *more))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_fsdp_configuration_names_the_layer():
    config = yaml.safe_load((SCRIPTS / "configs" / "landmark_fsdp.yaml").read_text())
    layer = config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert layer in LandmarkForCausalLM._no_split_modules
