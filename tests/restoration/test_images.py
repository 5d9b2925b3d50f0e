"""Reading and writing image files: no information is lost, and unreadable files are named."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import pipeline

from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATForImageSuperResolution
from hf_attn.restoration.images import as_rgb, decode_image


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    config = HATConfig.from_variant("tiny", upscale=2, drop_path_rate=0.5)
    return pipeline("image-restoration", model=HATForImageSuperResolution(config).train(), device="cpu")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_the_model_of_a_pipeline_is_in_eval_mode(pipe, pixels):
    assert not pipe.model.training
    np.testing.assert_array_equal(np.asarray(pipe(pixels)), np.asarray(pipe(pixels)))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "2"])
def test_a_batch_has_at_least_one_tile(pipe, pixels, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a number of tiles, at least 1"):
        pipe(pixels, batch_size=batch_size)


@pytest.mark.parametrize("tiles", [{"tile": 8.0}, {"tile_overlap": -1}, {"tile_overlap": 0.5}])
def test_tiles_have_whole_sides(pipe, pixels, tiles):
    with pytest.raises(ValueError, match="tile"):
        pipe(pixels, **tiles)


def test_profile_and_dpi_are_kept(pipe, pixels, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("photo.png", "photo.jpg", "photo.tif"):
        Image.fromarray(pixels).save(tmp_path / name, icc_profile=profile, dpi=(300, 300))
        info = pipe(str(tmp_path / name)).info
        assert info["icc_profile"] == profile
        assert [round(float(value)) for value in info["dpi"]] == [300, 300]
    # Values in this profile are converted to RGB.
    Image.fromarray(pixels).convert("CMYK").save(
        tmp_path / "print.tif", icc_profile=profile[:16] + b"CMYK" + profile[20:]
    )
    assert "icc_profile" not in pipe(str(tmp_path / "print.tif")).info


@pytest.mark.parametrize("name", ["pages.tif", "animation.gif", "animation.webp", "animation.png"])
def test_all_frames_are_restored(pipe, tmp_path, name):
    frames = [Image.fromarray(np.full((12, 16, 3), 80 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=70, lossless=True)
    result = pipe(str(tmp_path / name))
    assert [image.size for image in result] == [(32, 24)] * 3
    for image, frame in zip(result, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(pipe(frame)))
    with pytest.warns(UserWarning, match=f"{name} has 3 frames or pages; only the first is read"):
        decode_image(tmp_path / name)
    with pytest.warns(UserWarning, match="has 3 frames or pages; only the current one"):
        pipe(Image.open(tmp_path / name))


def test_deep_images_are_scaled_to_rgb(tmp_path):
    for low in (3000, 30000):
        deep = (np.arange(1600).reshape(40, 40) * 20 + low).astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        expected = (deep / 257).round().astype(np.uint8)[..., None].repeat(3, -1)
        np.testing.assert_array_equal(np.asarray(as_rgb((tmp_path / "deep.png").read_bytes())), expected)
    assert as_rgb(Image.new("LA", (3, 4), (9, 200))).getpixel((0, 0)) == (9, 9, 9)


def test_a_file_that_is_cut_off_is_named(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"folder/cut\.jpg cannot be read: it is corrupt or truncated"):
        as_rgb((tmp_path / "cut.jpg").read_bytes(), "folder/cut.jpg")


def test_without_pillow_the_extra_is_named():
    modules = ["hf_attn.restoration.images", "hf_attn.restoration.degradation", "hf_attn.modeling.oat.drawing"]
    code = f"""
import importlib, sys
sys.modules["PIL"] = None
for name in {modules}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.count("pip install 'hf_attn[vision]'") == len(modules)
