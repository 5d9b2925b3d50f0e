"""scripts/train_sd_rpn.py: its default task, datasets of labels, resuming, several processes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_attn.modeling.sd_rpn.generation import SdRpnGenerator
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from hf_attn.modeling.sd_rpn.training import SdRpnTrainer
from tests.batteries.scripts import SCRIPTS, loaded_script
from tests.modeling.sd_rpn.tiny import BRANCH, GRID, picture, tiny_base, tiny_processor


ROOT = Path(__file__).parents[2]
SCRIPT = SCRIPTS / "train_sd_rpn.py"
QUIET = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("train_sd_rpn") as module:
        yield module


def planted(output, *more) -> list[str]:
    sizes = ["--validation_size", 4, "--num_overlays", 2, "--num_planted", 8, "--max_steps", 4, "--save_steps", 2]
    return [str(word) for word in ["--output_dir", output, *sizes, *QUIET, *more]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_base("llava").save_pretrained(folder)
    tiny_processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    grids = torch.randint(0, 2, (8, GRID, GRID), generator=torch.Generator().manual_seed(0)).tolist()
    images = [picture(60, 50, seed=i) for i in range(8)]
    columns = {"image": images, "question": ["Where?"] * 8, "roi_labels": grids, "answer": ["There."] * 8}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(folder)
    return folder


def labelled(base, labels, output, *more) -> list[str]:
    data = ["--model_name_or_path", base, "--labels", labels, labels, "--branch_layer", BRANCH, "--max_steps", 2]
    return [
        str(word)
        for word in [*data, "--output_dir", output, "--validation_size", 4, "--num_overlays", 2, *QUIET, *more]
    ]


def weights(folder):
    return load_file(folder / "rpn" / "model.safetensors")


def test_the_default_task_ends_in_a_base_a_network_and_overlays(script, tmp_path, capsys):
    metrics = script.main(planted(tmp_path / "out"))
    output = capsys.readouterr().out
    assert "8 images to train on, 4 held out" in output
    assert {"eval_loss", "mean_iou", "untrained_mean_iou", "target_mean_iou"} == metrics.keys()
    for name in ("eval loss", "mean iou", "untrained mean iou"):
        assert f"\n{name} " in output
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == metrics
    assert metrics["target_mean_iou"] > 0.6
    overlays = sorted((tmp_path / "out" / "overlays").iterdir())
    assert [overlay.name for overlay in overlays] == ["00.png", "01.png"]
    assert Image.open(overlays[0]).size[1] > 200

    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "base")
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "base")
    rpn = AutoModel.from_pretrained(tmp_path / "out" / "rpn")
    assert isinstance(rpn, SdRpnModel)
    assert rpn.config.threshold() == script.PLANTED_THRESHOLD
    row = script.PlantedSquares(1, script.PLANTED_GRID, seed=9)[0]
    (answer,) = SdRpnGenerator(base, rpn, processor).generate(row["question"], row["image"], max_new_tokens=2)
    assert answer.images[0].roi_map.shape == (script.PLANTED_GRID,) * 2
    card = (tmp_path / "out" / "rpn" / "README.md").read_text()
    assert "untrained_mean_iou" in card
    assert "learning_rate" in card


def test_killed_and_restarted_it_ends_with_the_same_weights(script, tmp_path, monkeypatch):
    script.main(planted(tmp_path / "whole"))

    def killed(trainer, *positional, **kwargs):
        result = step(trainer, *positional, **kwargs)
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return result

    step = SdRpnTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SdRpnTrainer, "training_step", killed)
        script.main(planted(tmp_path / "resumed"))
    assert not (tmp_path / "resumed" / "rpn").exists()
    metrics = script.main(planted(tmp_path / "resumed"))
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert script.main(planted(tmp_path / "resumed")) == metrics


def test_trains_on_data_sets_of_labels_and_further(script, base, labels, tmp_path):
    metrics = script.main(labelled(base, labels, tmp_path / "a"))
    assert metrics.keys() == {"eval_loss"}
    assert len(list((tmp_path / "a" / "overlays").iterdir())) == 2
    untrained = SdRpnModel.from_base(tiny_base("llava"), branch_layer=BRANCH).state_dict()
    trained = weights(tmp_path / "a")
    assert any(not torch.equal(tensor, untrained[name]) for name, tensor in trained.items())

    arguments = labelled(base, labels, tmp_path / "b", "--rpn", tmp_path / "a" / "rpn", "--learning_rate", "1e-12")
    position = arguments.index("--branch_layer")
    script.main(arguments[:position] + arguments[position + 2 :])
    for name, tensor in weights(tmp_path / "b").items():
        torch.testing.assert_close(tensor, trained[name], atol=1e-7, rtol=0)


def test_recipes_are_the_papers_unless_something_else_is_said(script, base, labels, tmp_path):
    arguments = [
        "--model_name_or_path",
        str(base),
        "--labels",
        str(labels),
        "--output_dir",
        str(tmp_path / "a"),
        "--use_cpu",
        "true",
    ]
    _, _, training_args = script.parse_arguments(arguments)
    assert (training_args.learning_rate, training_args.adam_beta1, training_args.adam_beta2) == (5e-5, 0.9, 0.98)
    assert (training_args.weight_decay, training_args.warmup_steps, training_args.num_train_epochs) == (0, 0.03, 1)
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (8, 16)
    assert training_args.lr_scheduler_type == "cosine"
    _, _, training_args = script.parse_arguments([*arguments, "--learning_rate", "1e-3"])
    assert (training_args.learning_rate, training_args.per_device_train_batch_size) == (1e-3, 8)

    qwen = tmp_path / "qwen"
    tiny_base("qwen2_5_vl").config.save_pretrained(qwen)
    settings = {
        "model_name_or_path": str(qwen),
        "labels": [str(labels)],
        "output_dir": str(tmp_path / "b"),
        "use_cpu": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    _, _, training_args = script.parse_arguments([str(tmp_path / "settings.json")])
    assert (training_args.learning_rate, training_args.max_grad_norm) == (1e-4, 1.0)
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (16, 2)


def test_two_processes_train_one_network(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *planted(tmp_path / "out", "--ddp_backend", "gloo", "--max_steps", "2")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The network was saved to") == 1
    assert "destroy_process_group" not in done.stderr
    assert json.loads((tmp_path / "out" / "_hf_attn_run.json").read_text())["settings"]["world_size"] == 2
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()).keys() >= {"mean_iou"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--labels", "x"), "--model_name_or_path and --labels must be used together"),
        (("--num_overlays", 9), "--num_overlays must be at most --validation_size"),
        (("--rpn", "x", "--branch_layer", 2), "--branch_layer is for a new network"),
    ],
)
def test_arguments_that_contradict_each_other(script, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        script.main(planted(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit(script, base, labels, tmp_path):
    text = tmp_path / "bert"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit, match=r"is a 'bert', but SD-RPN supports only llava, llava_next, qwen2_5_vl"):
        script.main(labelled(text, labels, tmp_path / "a"))
    with pytest.raises(SystemExit, match="have 16 images, but must have more than --validation_size 16"):
        script.main(labelled(base, labels, tmp_path / "b", "--validation_size", 16))
    datasets.load_from_disk(labels).remove_columns("roi_labels").save_to_disk(tmp_path / "bare")
    with pytest.raises(SystemExit, match=r"has no roi_labels; create labels by scripts/make_sd_rpn_labels\.py"):
        script.main(labelled(base, tmp_path / "bare", tmp_path / "c"))
    with pytest.raises(ValueError, match=r"is for a llava whose decoder has 7 layers of width 32"):
        SdRpnModel.from_base(tiny_base("llava"), branch_layer=BRANCH).save_pretrained(tmp_path / "rpn")
        script.main(planted(tmp_path / "d", "--rpn", tmp_path / "rpn"))


def test_what_is_in_the_output_folder_is_not_overwritten_unasked(script, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite_output_dir",)):
        with pytest.raises(SystemExit, match="contains no run of hf_attn"):
            script.main(planted(tmp_path, *more))
    assert (tmp_path / "notes.txt").read_text() == "mine"
