"""Every script with an evaluation, in two processes with an odd amount of data: the metrics are those of one process.

With a learning rate of zero, the evaluated model does not depend on the number of processes that trained it.
"""

import json
import numbers
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hf_attn import GMANConfig, GMANForPrediction
from tests.batteries.scripts import loaded_script
from tests.batteries.text import byte_tokenizer, llama
from tests.distributed.processes import free_port, in_processes, set_launcher_variables


pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("peft")
pytest.importorskip("torchvision")
pytest.importorskip("diffusers")

PROCESSES = 2
COMMON = "--report_to none --disable_tqdm true --seed 3 "
STILL = (
    COMMON
    + "--save_strategy no --learning_rate 0 --max_steps 1 --per_device_train_batch_size 2 --per_device_eval_batch_size 2 "
)

# script -> its arguments; {data} is a folder of what `make_data` writes
CASES = {
    "run_clm": STILL + "--train_file {data}/text.txt --block_size 32 --vocab_size 270 --max_eval_samples 5 "
    "--model_type sigmoid_attention --config_overrides hidden_size=16 intermediate_size=16 num_hidden_layers=1 "
    "num_attention_heads=2",
    "run_deberta": STILL
    + "--hidden_size 16 --num_hidden_layers 1 --finetune_epochs 0.01 --finetune_learning_rate 0 --num_topics 3 --seeds 1",
    "run_embedding": STILL
    + "--model_name_or_path {data}/base --dataset_name {data}/pairs --num_held_out 9 --design 2 "
    "--num_latents 2 --num_pooling_heads 2 --pooling_head_dim 4 --max_length 8",
    "run_image_classification": STILL + "--max_eval_samples 5 --model_type tnt --config_overrides image_size=16 "
    "hidden_size=48 inner_hidden_size=8 num_hidden_layers=1",
    "run_landmark": STILL + "--model_name_or_path {data}/base --train_file {data}/text.txt "
    "--validation_file {data}/short.txt --perplexity_lengths 16 --passkey_lengths 320 --passkey_depths 0 "
    "--passkey_trials 1 --cache_top_k 2 --mem_freq 7 --train_context_length 64",
    "run_scanpaths": STILL.replace("strategy no", "strategy epoch")
    + "--num_images 20 --searches 1 --num_samples 1 --num_drawings 1",
    "run_speech_classification": STILL + "--num_speakers 17 --num_seeds 1 --modalities text",
    "run_super_resolution": COMMON + "--do_eval --scale 2 --train_dir {data}/images --patch_size 8 --model_type hat "
    "--config_overrides embed_dim=8 depths=[1] num_heads=[2] window_size=4 compress_ratio=2 squeeze_factor=2",
    "run_text_classification": STILL + "--dataset_name {data}/texts --num_layers 1 --max_length 32",
    "run_traffic": COMMON + "--do_eval --per_device_eval_batch_size 4 --model_name_or_path {data}/gman "
    "--data_file {data}/speed.h5",
    "train_sd_rpn": STILL + "--num_planted 8 --validation_size 5 --num_overlays 1",
}


def make_data(folder: Path) -> None:
    (folder / "text.txt").write_text("one two three four five six seven\n" * 700)
    (folder / "short.txt").write_text("Blocks are read when their landmarks are scored highest. " * 2)
    llama(num_hidden_layers=1).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
    for name, picture in {"colour": smooth, "grey": smooth[:71, :, 0], "other": smooth[:, ::-1]}.items():
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "images" / f"{name}.png")
    for label, letter in (("early", "a"), ("late", "z")):
        (folder / "texts" / label).mkdir(parents=True)
        for index in range(25):
            (folder / "texts" / label / f"{index}.txt").write_text(letter * (index % 7 + 1))
    (folder / "pairs").mkdir()
    rows = [{"query": 2 * letter, "positive": letter.upper()} for letter in "abcdefghijklmnopqrs"]
    (folder / "pairs" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # 193 time steps give 33 test windows
    index = pd.date_range("2012-03-01", periods=193, freq="15min")
    pd.DataFrame(rng.uniform(20, 70, (193, 4)), index, list("abcd")).to_hdf(folder / "speed.h5", key="df")
    torch.manual_seed(0)
    config = GMANConfig.from_variant(
        "gman_pems",
        num_nodes=4,
        steps_per_day=96,
        context_length=4,
        prediction_length=3,
        num_hidden_layers=1,
        value_mean=45.0,
        value_std=14.0,
    )
    GMANForPrediction(config).save_pretrained(folder / "gman")


def numbers_of(result, name: str = "") -> dict[str, float]:
    """The metrics in the return value of a script, without times and without the epoch, which counts batches per process."""
    if isinstance(result, dict):
        return {key: value for part in result for key, value in numbers_of(result[part], f"{name}/{part}").items()}
    timed = any(word in name for word in ("time", "second", "ms", "memory", "epoch"))
    return {name: float(result)} if isinstance(result, numbers.Number) and not timed else {}


def run(name: str, data: str, output: Path) -> dict[str, float] | str:
    """The metrics of a script, or the message with which it ends."""
    with loaded_script(name) as module:
        result = module.main(["--output_dir", str(output), *CASES[name].format(data=data).split()])
    if name == "run_deberta":
        # Each process masks at random.
        del result["pretraining"]
    if name == "run_landmark":
        # written by the first process
        file = output / "evaluation_landmark.json"
        result = json.loads(file.read_text()) if file.exists() else {}
    state = output / "trainer_state.json"
    logged = json.loads(state.read_text())["log_history"] if state.exists() else []
    evaluations = [{key: entry[key] for key in entry if key.startswith("eval_")} for entry in logged]
    return numbers_of(result) | numbers_of(dict(enumerate(evaluations)))


def everything(rank: int, data: str, outputs: str, port: int) -> dict[str, dict[str, float] | str]:
    set_launcher_variables(rank, PROCESSES, port)
    os.environ["HF_DATASETS_CACHE"] = f"{outputs}/cache"
    return {name: run(name, data, Path(outputs, name)) for name in CASES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two"))
    return in_processes(everything, PROCESSES, data, folder, free_port(), timeout=600)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_one_process(name, data, two_processes, tmp_path):
    one = run(name, data, tmp_path / "out")
    assert one
    assert two_processes[0][name] == pytest.approx(one, rel=1e-4, nan_ok=True)
