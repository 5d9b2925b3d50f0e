"""The training script of the super-resolution models: it learns, resumes, changes scale and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from transformers import AutoModelForImageToImage

from hf_attn.restoration.pairs import low_resolution
from hf_attn.restoration.resize import crop_to_multiple
from tests.batteries.scripts import loaded_script


TINY = ["embed_dim=8", "depths=[1]", "num_heads=[2]", "window_size=4", "compress_ratio=2", "squeeze_factor=2"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_super_resolution") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of different sizes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
    Image.fromarray(smooth).save(folder / "colour.png")
    Image.fromarray(smooth[:71, :, 0]).save(folder / "grey.png")
    (folder / "deeper").mkdir()
    Image.fromarray(smooth[:, ::-1]).save(folder / "deeper" / "other.webp", lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


def arguments(folder: Path, output_dir: Path, *more: str) -> list[str]:
    common = ("--train_dir", str(folder), "--output_dir", str(output_dir), "--patch_size", "8", "--use_cpu", "true")
    quiet = ("--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--report_to", "none")
    return [*common, *quiet, *more]


def tiny(folder: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--model_type", "hat", "--config_overrides", *TINY, *arguments(folder, output_dir, *more)]


@pytest.mark.parametrize("family", ["hat", "drct"])
def test_learns_and_reports_bicubic_beside_it(script, folder, tmp_path, family):
    overrides = TINY if family == "hat" else [*TINY[:4], "growth_channels=4"]
    common = ["--model_type", family, "--scale", "3", "--start", "random", "--config_overrides", *overrides]
    before = script.main([*common, *arguments(folder, tmp_path / "before", "--do_eval")])
    after = script.main([*common, *arguments(folder, tmp_path / "after", "--max_steps", "60", "--ema_decay", "0.9")])
    assert after["eval_loss"] < before["eval_loss"] / 1.5
    assert after["eval_psnr"] > before["eval_psnr"]
    assert after["eval_bicubic_psnr"] == before["eval_bicubic_psnr"] > 15
    saved = AutoModelForImageToImage.from_pretrained(tmp_path / "after")
    assert saved.config.upscale == 3
    assert "hf_attn" in (tmp_path / "after" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "after" / "eval_results.json").read_text())["eval_psnr"] == after["eval_psnr"]


@pytest.mark.parametrize("family", ["hat", "drct"])
def test_starts_as_good_as_interpolation_and_recipes_at_random(script, folder, tmp_path, family):
    overrides = TINY if family == "hat" else [*TINY[:4], "growth_channels=4"]
    common = ["--model_type", family, "--config_overrides", *overrides]
    start = script.main([*common, *arguments(folder, tmp_path / "start", "--do_eval")])
    assert start["eval_psnr"] > start["eval_bicubic_psnr"] - 1
    recipe = script.main([*common, *arguments(folder, tmp_path / "recipe", "--do_eval", "--recipe", "scratch")])
    assert recipe["eval_psnr"] < recipe["eval_bicubic_psnr"] - 5


def test_the_average_is_evaluated_saved_and_resumed(script, folder, tmp_path):
    whole = script.main(tiny(folder, tmp_path / "whole", "--max_steps", "6", "--seed", "3"))
    part = tiny(folder, tmp_path / "part", "--max_steps", "6", "--save_steps", "3", "--seed", "3")
    script.main(part)
    last = torch.load(tmp_path / "part" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert last["state"]
    average = script.load_file(tmp_path / "part" / "checkpoint-6" / "weight_average.safetensors")
    saved = AutoModelForImageToImage.from_pretrained(tmp_path / "part").state_dict()
    raw = AutoModelForImageToImage.from_pretrained(tmp_path / "part" / "checkpoint-6").state_dict()
    for name, weight in average.items():
        torch.testing.assert_close(saved[name], weight, atol=0, rtol=0)
    assert any((raw[name] != weight).any() for name, weight in average.items())

    resumed = script.main([*part, "--resume_from_checkpoint", str(tmp_path / "part" / "checkpoint-3")])
    assert resumed["eval_psnr"] == pytest.approx(whole["eval_psnr"], abs=0.05)


@pytest.mark.parametrize("scale", [3, 4])
def test_another_scale_starts_from_scale_2(script, folder, tmp_path, scale):
    script.main(tiny(folder, tmp_path / "x2", "--scale", "2", "--max_steps", "1"))
    more = ("--scale", str(scale), "--max_steps", "1", "--recipe", "x4_from_x2", "--learning_rate", "1e-9")
    script.main(["--model_name_or_path", str(tmp_path / "x2"), *arguments(folder, tmp_path / "more", *more)])
    two, more = (AutoModelForImageToImage.from_pretrained(tmp_path / name) for name in ("x2", "more"))
    assert more.config.upscale == scale
    assert len(more.reconstruction.convolutions) == {3: 1, 4: 2}[scale]
    torch.testing.assert_close(more.hat.first_convolution.weight, two.hat.first_convolution.weight, atol=1e-7, rtol=0)


def test_a_recipe_halves_the_learning_rate_at_its_milestones(script, folder, tmp_path):
    model_args, _, training_args = script.parse_arguments(tiny(folder, tmp_path / "out", "--recipe", "scratch"))
    assert (training_args.max_steps, training_args.learning_rate, training_args.ema_decay) == (500_000, 2e-4, 0.999)
    training_args.max_steps = 100
    model = script.make_model(model_args)
    trainer = script.Trainer(model=model, args=training_args, weight_average=script.WeightAverage(model, 0.999))
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [rates[step] for step in (0, 49, 50, 79, 80, 89, 90, 94, 95)] == pytest.approx(
        [2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5, 1.25e-5]
    )


def test_a_patch_is_cut_out_of_the_scaled_down_image(script, folder):
    """The low-resolution patch equals the corresponding part of the downscaled image."""
    images = script.Images(script.image_files(str(folder)))
    assert [len(image) for image in images] == [3, 3, 3]
    patches = script.Patches(images, 2, 8)
    whole = low_resolution(crop_to_multiple(images[0], 2).float() / 255, 2, "bicubic")
    windows = whole.unfold(1, 8, 1).unfold(2, 8, 1)
    for seed in range(8):
        torch.manual_seed(seed)
        low = patches[0]["pixel_values"]
        found = False
        for turns in range(4):
            for flip in ((), (-1,)):
                turned = low.rot90(turns, (-2, -1)).flip(flip)
                found |= bool(((windows - turned[:, None, None]).abs().amax((0, 3, 4)) < 1e-6).any())
        assert found


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "fast"], "--recipe fast is not one of scratch, x4_from_x2, imagenet, finetune"),
        (["--dataset_name", "x"], "either --dataset_name or --train_dir"),
        (["--model_name_or_path", "x"], "exactly one of --model_name_or_path, --model_type"),
        (["--resume_from_checkpoint", "last"], "no checkpoint in"),
        (["--start", "bicubic"], "--start bicubic is not one of interpolation, random"),
    ],
)
def test_arguments_that_contradict_each_other(script, folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        script.main(tiny(folder, tmp_path, *more))


def test_folders_and_fields_that_are_wrong(script, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there are no images"):
        script.main(tiny(tmp_path / "empty", tmp_path / "out"))
    wrong = ["--model_type", "hat", "--config_overrides", "embed_dims=8"]
    with pytest.raises(SystemExit, match="did you mean embed_dim"):
        script.main([*wrong, *arguments(folder, tmp_path / "out2")])
    with pytest.raises(SystemExit, match="nonsense is not one of hat, drct"):
        script.main(["--model_type", "nonsense", *arguments(folder, tmp_path / "out3")])
    with pytest.raises(ValueError, match="smaller than patches of 200"):
        script.main(tiny(folder, tmp_path / "out4", "--patch_size", "100", "--max_steps", "1"))


def test_does_not_overwrite(script, folder, tmp_path):
    (tmp_path / "file").write_text("precious")
    for more in ([], ["--overwrite_output_dir"]):
        with pytest.raises(SystemExit, match="is not empty and contains no run of hf_attn"):
            script.main(tiny(folder, tmp_path, *more))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(torchvision.models.vgg19().state_dict(), file)
    return file


def test_the_recipes_of_real_photographs_one_after_the_other(script, folder, vgg_file, tmp_path):
    """Sharpened targets first, then the adversarial stage, interrupted and resumed."""
    script.main(tiny(folder, tmp_path / "real", "--recipe", "real", "--max_steps", "1", "--patch_size", "8"))
    more = ("--recipe", "real_gan", "--max_steps", "3", "--discriminator_features", "4", "--save_steps", "2")
    weights = ("--perceptual_weights", str(vgg_file), "--logging_steps", "1", "--sharpen_targets", "true")
    stage = ["--model_name_or_path", str(tmp_path / "real"), *arguments(folder, tmp_path / "gan", *more, *weights)]
    first = script.main(stage)
    assert first["eval_psnr"] > 5
    lines = json.loads((tmp_path / "gan" / "trainer_state.json").read_text())["log_history"][:3]
    assert all(line["discriminator_loss"] > 0 and line["perceptual_loss"] > 0 for line in lines)

    last = torch.load(tmp_path / "gan" / "checkpoint-3" / "discriminator.pt", weights_only=True)
    script.main([*stage, "--resume_from_checkpoint", str(tmp_path / "gan" / "checkpoint-2")])
    again = torch.load(tmp_path / "gan" / "checkpoint-3" / "discriminator.pt", weights_only=True)
    assert {int(state["step"]) for state in again["optimizer"]["state"].values()} == {3}
    # One Adam step later with other patches; a new discriminator would differ much more.
    torch.testing.assert_close(again["discriminator"], last["discriminator"], atol=1e-3, rtol=0)


def test_without_weights_of_vgg_the_log_says_so(script, folder, tmp_path, caplog):
    more = ("--adversarial", "true", "--discriminator_features", "2", "--max_steps", "1", "--logging_steps", "1")
    script.logging.enable_propagation()
    script.main(tiny(folder, tmp_path, *more, "--patch_size", "4"))
    script.logging.disable_propagation()
    assert "without the perceptual loss" in caplog.text
    line = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert "adversarial_loss" in line
    assert "perceptual_loss" not in line


def test_patches_of_the_second_order(script, folder, monkeypatch):
    """The low-resolution image comes from the photograph, the labels are sharpened, and all are cropped at the same position."""
    images = script.Images(script.image_files(str(folder)))
    options = {"degradation": "second_order", "sharpen_targets": True, "keep_originals": True}
    patches = script.Patches(images, 2, 8, **options)
    degraded = [patches[0]["pixel_values"] for _ in range(2)]
    assert all(((255 * low - (255 * low).round()).abs() < 1e-3).all() for low in degraded)
    pairs = script.WholeImages(images, 2, 40, "second_order")
    torch.testing.assert_close(pairs[0]["pixel_values"], pairs[0]["pixel_values"], atol=0, rtol=0)

    def shrink(high, scale, generator=None):
        return torch.nn.functional.avg_pool2d(high, scale)

    monkeypatch.setattr("hf_attn.restoration.pairs.degrade", shrink)
    for seed in range(8):
        torch.manual_seed(seed)
        example = patches[0]
        assert example["labels"].shape == example["originals"].shape == (3, 16, 16)
        torch.testing.assert_close(example["pixel_values"], shrink(example["originals"], 2))
        assert (example["labels"] - example["originals"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--degradation", "third_order"], "--degradation third_order is not one of bicubic, second_order"),
        (["--perceptual_weights", "vgg.pth"], r"need adversarial training \(--adversarial true\)"),
        (["--adversarial", "true", "--perceptual_weights", "vgg.pth"], "vgg.pth is not a file"),
        (["--adversarial", "true", "--patch_size", "6"], r"side \(12\) is a multiple of 8; change --patch_size"),
    ],
)
def test_real_photographs_that_contradict_themselves(script, folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        script.main(tiny(folder, tmp_path, *more))
