"""The training script of the image classifiers: it learns, mixes, reads folders, continues and refuses."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTForImageClassification,
    pipeline,
)

from hf_attn.analysis.vit import ViTLayout
from hf_attn.catalog import families
from hf_attn.cli.analyze_vit import TRAIN_DEFAULT
from tests.batteries.families import tiny_config
from tests.batteries.scripts import SCRIPTS, loaded_script


pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("torchvision")

SCRIPT = SCRIPTS / "run_image_classification.py"
IMAGE = [family.model_type for family in families() if "AutoModelForImageClassification" in family.models]
COMMON = ("--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true")
TINY = {
    "--model_type": "tnt",
    "--config_overrides": ["image_size=16", "hidden_size=48", "inner_hidden_size=8", "num_hidden_layers=2"],
}


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_image_classification") as module:
        yield module


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """Two classes of images, bright on the left or on the right."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8)):
        for side, name in enumerate(("left", "right")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (20, 20, 3), dtype=np.uint8)
                pixels[:, 10 * side : 10 * side + 10] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def arguments(output_dir: Path, *others: object) -> list[str]:
    tiny = [
        word for name, value in TINY.items() for word in ([name, *value] if isinstance(value, list) else [name, value])
    ]
    return [*tiny, "--output_dir", str(output_dir), *COMMON, *map(str, others)]


def test_learns_the_digits(script, tmp_path):
    metrics = script.main(arguments(tmp_path / "out", "--num_train_epochs", 8, "--augmentation", "none"))
    assert metrics["eval_accuracy"] > 0.8
    assert metrics["eval_accuracy_top5"] >= metrics["eval_accuracy"]
    # all 360 images, which are not a multiple of the batch size
    hits = metrics["eval_accuracy"] * 360
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]

    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    digits = script.load_digits()
    answers = [classify(row["image"].convert("RGB"))[0]["label"] for row in digits.select(range(40))]
    hits = sum(answer == str(row["label"]) for answer, row in zip(answers, digits, strict=False))
    assert hits > 30
    assert "TNTForImageClassification" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("model_type", IMAGE)
def test_every_family_runs(script, model_type, image_folder, tmp_path):
    tiny = tiny_config(model_type)
    own_fields = type(tiny).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() - {"model_type"}
    overrides = [f"{name}={json.dumps(value)}" for name, value in tiny.to_diff_dict().items() if name in own_fields]
    metrics = script.main(
        [
            *("--model_type", model_type, "--config_overrides", *overrides, "--dataset_name", str(image_folder)),
            *(
                "--output_dir",
                str(tmp_path / "out"),
                "--per_device_train_batch_size",
                "8",
                "--max_steps",
                "2",
                *COMMON,
            ),
        ]
    )
    assert metrics["eval_loss"] > 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.model_type == model_type and model.config.id2label == {0: "left", 1: "right"}
    assert AutoImageProcessor.from_pretrained(tmp_path / "out")


def test_mixed_labels_and_smoothing(script, image_folder, tmp_path):
    metrics = script.main(
        arguments(
            tmp_path / "out",
            *("--dataset_name", image_folder, "--mixup_alpha", 0.2),
            *("--label_smoothing_factor", 0.1, "--num_train_epochs", 40, "--per_device_train_batch_size", 8),
            *("--augmentation", "none"),
        )
    )
    assert metrics["eval_accuracy"] > 0.9


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_mixed_batch_has_soft_labels(script, alphas):
    collate = script.make_collator(script.DataArguments(**alphas), num_labels=3)
    batch = collate([{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i} for i in range(3)])
    assert batch["labels"].shape == (3, 3)
    torch.testing.assert_close(batch["labels"].sum(-1), torch.ones(3))
    # Labels are mixed as the images are: image i is full of i.
    means = batch["pixel_values"].mean((1, 2, 3))
    torch.testing.assert_close(means, batch["labels"] @ torch.arange(3.0))


def test_accuracy_of_the_first_and_of_five(script):
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0, 4.0]] * 3)
    metric = script.TopAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=script.first_classes(logits[:2], None), references=torch.tensor([1, 0]))
    metric.add_batch(predictions=script.first_classes((logits[2:], logits), None), references=torch.tensor([2]))
    assert metric.compute() == pytest.approx({"accuracy": 1 / 3, "accuracy_top5": 2 / 3})
    assert script.first_classes(logits[:, :2], None).tolist() == [[1, 0]] * 3


def test_a_checkpoint_is_trained_further_on_other_classes(script, image_folder, tmp_path):
    script.main(arguments(tmp_path / "first", "--max_steps", 1))
    second = ["--model_name_or_path", str(tmp_path / "first"), "--dataset_name", str(image_folder)]
    options = [
        "--output_dir",
        str(tmp_path / "second"),
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        *COMMON,
    ]
    script.main([*second, *options])
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "second").config
    assert config.num_labels == 2 and config.image_size == 16


def test_under_accelerate_launch(script, image_folder, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    # 15 evaluation images: the last batches of the two processes have different sizes.
    options = ["--dataset_name", image_folder, "--max_steps", 2, "--per_device_train_batch_size", 8]
    options += ["--max_eval_samples", 15, "--per_device_eval_batch_size", 4]
    command = [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments(tmp_path / "out", *options)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("TNTForImageClassification:") == 1
    evaluated = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    again = ["--model_name_or_path", str(tmp_path / "out"), "--dataset_name", str(image_folder), "--do_eval", *COMMON]
    alone = script.main([*again, "--max_eval_samples", "15", "--output_dir", str(tmp_path / "alone")])
    assert {name: evaluated[name] for name in ("eval_accuracy", "eval_loss")} == pytest.approx(
        {name: alone[name] for name in ("eval_accuracy", "eval_loss")}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("single", r"no image can be held out from classes with fewer than 2 images: y \(1\)"),
        ("cut", r"x/0\.jpg cannot be read: it is corrupt or truncated"),
        ("few", "there are 16 training images, fewer than one batch of 32"),
    ],
)
def test_unusable_images_are_named(script, tmp_path, monkeypatch, broken, message):
    monkeypatch.setattr(script.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for name, count in {"x": 10, "y": 1 if broken == "single" else 10}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels[index]).save(tmp_path / "data" / name / f"{index}.jpg")
    if broken == "cut":
        file = tmp_path / "data" / "x" / "0.jpg"
        file.write_bytes(file.read_bytes()[:400])
    batch = 32 if broken == "few" else 4
    options = ["--dataset_name", tmp_path / "data", "--per_device_train_batch_size", batch, "--num_train_epochs", 1]
    with pytest.raises((SystemExit, ValueError), match=message):
        script.main(arguments(tmp_path / "out", *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_type", "resnet"], "--model_type resnet is not one of"),
        (["--model_type", "tnt", "--model_name_or_path", "x"], "pass either"),
        (["--model_type", "tnt", "--mixup_alpha", "-1"], "--mixup_alpha=-1.0 is out of range: it must be at least 0"),
        (["--model_type", "tnt", "--config_overrides", "hiden_size=3"], "did you mean hidden_size"),
        (["--model_type", "biformer", "--variant", "huge"], "has no variant 'huge'; its variants: biformer_tiny"),
        (["--model_type", "path_ensemble", "--variant", "huge"], "its variants: none"),
    ],
)
def test_contradictions(script, options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        script.main([*options, "--output_dir", str(tmp_path / "out"), *COMMON])


def test_the_default_model_of_analyze_vit_is_a_plain_vit(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = shlex.split(TRAIN_DEFAULT)
    assert Path(command[1]).name == SCRIPT.name
    model_args = script.parse_arguments(command[2:])[0]
    model, processor = script.make_model(model_args, [str(digit) for digit in range(10)])
    assert isinstance(model, ViTForImageClassification) and model.config.num_labels == 10
    layout = ViTLayout.of(model)
    assert (layout.num_layers, layout.num_heads) == (4, 6)
    pixels = processor(script.load_digits()[0]["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
    assert (layout.grid_of(pixels).rows, layout.grid_of(pixels).cols) == (8, 8)


def test_a_folder_with_results_is_not_overwritten(script, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for more in ([], ["--overwrite_output_dir"]):
        with pytest.raises(SystemExit, match="is not empty and contains no run of hf_attn"):
            script.main(["--model_type", "tnt", "--output_dir", str(tmp_path), *COMMON, *more])


def test_tokens_are_mixed_and_labelled(script, image_folder, tmp_path):
    metrics = script.main(
        [
            *("--model_type", "rmt", "--dataset_name", str(image_folder), "--output_dir", str(tmp_path / "out")),
            *("--config_overrides", "image_size=64", "token_labeling=true", "hidden_sizes=[16,16,32,32]"),
            *("depths=[1,1,1,1]", "num_attention_heads=[1,1,2,2]", "projection_dim=32"),
            *("--mix_tokens", "--augmentation", "none", "--per_device_train_batch_size", "8", "--max_steps", "30"),
            *COMMON,
        ]
    )
    assert metrics["eval_accuracy"] > 0.9
    # The label maps say the contrary of the folders, of both halves of the images.
    folder = tmp_path / "mapped"
    shutil.copytree(image_folder, folder)
    words = [
        *("--model_type", "rmt", "--dataset_name", str(folder), "--config_overrides", "image_size=64"),
        *("token_labeling=true", "hidden_sizes=[16,16,32,32]", "depths=[1,1,1,1]", "num_attention_heads=[1,1,2,2]"),
        *("projection_dim=32", "--mix_tokens", "--label_maps", "--augmentation", "shift", "--max_steps", "30"),
        *("--per_device_train_batch_size", "8", *COMMON, "--output_dir"),
    ]
    with pytest.raises(FileNotFoundError, match=r"\.png has no label map: there is neither \d+\.npy"):
        script.main([*words, str(tmp_path / "missing")])
    for image in folder.glob("train/*/*.png"):
        np.save(image.with_suffix(".npy"), np.full((2, 3), image.parent.name == "left"))
    assert script.main([*words, str(tmp_path / "contrary")])["eval_accuracy"] < 0.1
    np.save(next(folder.glob("train/*/*.png")).with_suffix(".npy"), np.ones((3, 2, 2)))
    with pytest.raises(
        ValueError, match=r"png has the shape \(3, 2, 2\); it must be \(height, width\), \(2, height, width\)"
    ):
        script.main([*words, str(tmp_path / "shape")])
    with pytest.raises(SystemExit, match="--mix_tokens is for an RMT with token_labeling"):
        script.main(
            [
                *("--model_type", "shvit", "--dataset_name", str(image_folder), "--mix_tokens"),
                "--output_dir",
                str(tmp_path / "no"),
            ]
        )


def test_greyscale(script, image_folder, tmp_path):
    script.main(
        [
            *(
                "--model_type",
                "activator",
                "--config_overrides",
                "num_channels=1",
                "--dataset_name",
                str(image_folder),
            ),
            *(
                "--output_dir",
                str(tmp_path / "out"),
                "--max_steps",
                "2",
                "--per_device_train_batch_size",
                "8",
                *COMMON,
            ),
        ]
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.zeros((20, 20), dtype=np.uint8))
    assert model(**processor(picture, return_tensors="pt")).logits.shape == (1, 2)
