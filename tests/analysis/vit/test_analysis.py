"""The whole analysis: tables that agree with plain forward passes, output files, and bad input."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_attn.analysis.vit import ViTLayout, analyze, attention_strength, patch_entropy, without_heads
from hf_attn.analysis.vit.loading import sample_images
from hf_attn.analysis.vit.maps import attention_maps
from hf_attn.cli import main

from .models import MODELS, SQUARE, build, vit


FAST = {"curve_points": 0, "partial_heads": 0, "keep_one": False}


def images(count=5, name="vit"):
    return torch.randn(count, 3, 16 if name in SQUARE else 24, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_batches_do_not_matter_and_tables_are_what_plain_runs_say():
    model, _ = build("vit")
    model.train()
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = [analyze(model, images(), labels, batch_size=size, curve_points=3) for size in (2, 5)]
    assert model.training
    model.eval()
    importance, other = (analysis.tables()["importance"] for analysis in found)
    # The metrics are differences of float32 probabilities, whose rounding depends on the batch size.
    pd.testing.assert_frame_equal(importance, other, rtol=1e-4, atol=1e-6)
    p, y = model(images()).logits.softmax(-1), labels[:, None]
    with without_heads(model, {1: [2]}):
        q = model(images()).logits.softmax(-1)
    row = importance[(importance.layer == 1) & (importance["head"] == 2)].iloc[0]
    assert row.label_prob_drop == pytest.approx((p.gather(1, y) - q.gather(1, y)).mean().item(), abs=1e-5)
    assert row.flip_rate == pytest.approx((p.argmax(1) != q.argmax(1)).float().mean().item())

    maps = attention_maps(ViTLayout.of(model), images())
    analysis = found[0]
    torch.testing.assert_close(analysis.mean_maps, maps.mean(2))
    torch.testing.assert_close(analysis.patch_entropy, patch_entropy(maps, analysis.grid).mean(-1))
    torch.testing.assert_close(analysis.strength.mean_hop, attention_strength(maps.mean(2), analysis.grid).mean_hop)

    curve = analysis.tables()["curve"]
    accuracy = (p.argmax(1) == labels).float().mean().item()
    assert curve[curve.removed == 0]["mean"].tolist() == pytest.approx([accuracy] * 3)
    assert np.ptp(curve[curve.removed == 9]["mean"]) < 1e-9
    partial = analysis.tables()["partial"]
    whole = partial[partial.part == "head"].merge(importance, on=["layer", "head"])
    assert len(whole) == 3
    # A divergence is quadratic in differences that are small compared with the probabilities, so it keeps half of their digits.
    np.testing.assert_allclose(whole.jsd_x, whole.jsd_y, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_every_kind_of_model_is_analysed(name):
    model, _ = build(name)
    analysis = analyze(model, images(3, name), **FAST)
    tables = analysis.tables()
    assert {"importance", "layers", "images", "strength", "hops", "trend", "clusters"} <= set(tables)
    assert len(tables["importance"]) == 9 and np.isfinite(tables["importance"]).all(axis=None)
    assert ("jsd" in analysis.metrics) == (name not in ("clip", "siglip"))


def test_half_precision_is_analysed():
    model, _ = build("vit")
    reference = analyze(model, images(), **FAST)
    analysis = analyze(model.bfloat16(), images(), **FAST)
    # Logits up to 4 have eight bits in bfloat16, so their error is at most 2**-6; that of weights below 1 is smaller.
    torch.testing.assert_close(analysis.mean_maps.float(), reference.mean_maps.float(), atol=2**-6, rtol=0)


def test_tables_are_written_and_nothing_is_overwritten(tmp_path):
    analysis = analyze(build("vit")[0], images(), **FAST)
    folder = analysis.save(tmp_path / "results")
    table = pd.read_csv(folder / "importance.csv")
    pd.testing.assert_frame_equal(table, analysis.tables()["importance"], check_dtype=False)
    assert json.loads((folder / "importance.json").read_text())[4]["layer"] == 1
    for write in (analysis.save, analysis.report):
        with pytest.raises(ValueError, match="results is not empty"):
            write(folder)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": torch.zeros(2, 3, 16, 16)}, "Images are 16 x 16 pixels"),
        ({"images": torch.zeros(1, 3, 24, 16)}, "pass at least 2, got 1"),
        ({"images": torch.zeros(0, 3, 24, 16)}, "pass at least 2, got 0"),
        ({"images": torch.zeros(2, 3, 24, 16, dtype=torch.uint8)}, "must be floating-point"),
        ({"images": torch.full((2, 3, 24, 16), torch.nan)}, "contain NaN or infinity"),
        ({"images": [Image.new("RGB", (8, 8))] * 2}, "need `processor`"),
        ({"labels": [0, 5, 1]}, "Label 5 is out of range: the model has 5 classes"),
        ({"labels": ["LABEL_0", "cat", "LABEL_1"]}, "Label 'cat' is not a class of the model. Its classes: LABEL_0"),
        ({"labels": [0, 1]}, "one class index for each of the 3 images"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"curve_points": 1}, "at least 2 \\(no head removed"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        analyze(vit(), **{"images": images(3), **arguments})


def test_labels_need_a_classifier():
    with pytest.raises(ValueError, match="the model has no classifier"):
        analyze(build("clip")[0], images(3, "clip"), [0, 0, 0])


@pytest.fixture
def saved(tmp_path):
    vit(image_size=16, num_labels=2, id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path


def test_the_command_writes_a_report(saved, capsys):
    arguments = [
        "analyze-vit",
        str(saved / "model"),
        "--images",
        str(saved / "images"),
        "--output",
        str(saved / "report"),
    ]
    assert main([*arguments, "--no-keep-one", "--partial-heads", "1"]) == 0
    output = capsys.readouterr()
    assert "3 layers x 3 heads, 4 images" in output.out and "report.html" in output.out
    assert "Analysing: 100%" in output.err
    table = pd.read_csv(saved / "report" / "images.csv")
    assert table.label.tolist() == ["cat", "cat", "dog", "dog"]
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_command_names_what_is_wrong(saved, capsys, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / "images" / "cat").rename(saved / "images" / "bird")
    for arguments, message in (
        ([], "scripts/run_image_classification.py --model_type vit"),
        (["model", "--images", "nowhere"], "nowhere is not a folder of images"),
        (["model", "--images", "model"], "model contains no images"),
        (["model", "--images", "images"], "is not named after a class"),
    ):
        assert main(["analyze-vit", *arguments, "--output", "report"]) == 2
        assert message in capsys.readouterr().err


def test_without_a_folder_there_are_images_to_analyse():
    digits, labels = sample_images([str(digit) for digit in range(10)], 12)
    assert len(digits) == 12 and set(labels) <= {str(digit) for digit in range(10)}
    photographs, labels = sample_images(["cat"], 9)
    assert len(photographs) == 9 and labels is None and photographs[0].size == (512, 512)
