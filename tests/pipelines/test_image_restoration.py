"""The pipeline `image-restoration`: any image in, an image of exactly the right size, depth and kind out."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageToImage, Swin2SRConfig, Swin2SRForImageSuperResolution, pipeline
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.utils import logging

from hf_attn.architectures.restoration.memory import activation_bytes_per_pixel, parse_memory
from hf_attn.modeling.drct.configuration_drct import DRCTConfig
from hf_attn.modeling.drct.modeling_drct import DRCTForImageSuperResolution
from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATForImageSuperResolution
from hf_attn.restoration.metrics import to_uint8


SHELL = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}


def make_model(upscale=2, num_channels=3, family="hat", gain=10):
    """A model with random weights, whose output depends on the image if the gain is larger than one."""
    torch.manual_seed(0)
    if family == "drct":
        config = DRCTConfig(**SHELL, growth_channels=4, upscale=upscale, num_channels=num_channels)
        return DRCTForImageSuperResolution(config).eval()
    config = HATConfig(**SHELL, compress_ratio=2, squeeze_factor=2, upscale=upscale, num_channels=num_channels)
    model = HATForImageSuperResolution(config).eval()
    with torch.no_grad():
        model.reconstruction.final_convolution.weight.mul_(gain)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe(model):
    return pipeline("image-restoration", model=model, device="cpu")


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)


def reference(model, array: np.ndarray) -> np.ndarray:
    """The network's output for an 8-bit RGB array."""
    with torch.no_grad():
        pixel_values = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
        return to_uint8(model(pixel_values).reconstruction[0]).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("family", ["hat", "drct"])
@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (13, 10)])
def test_exact_size_at_every_scale(family, upscale, size):
    pipe = pipeline("image-restoration", model=make_model(upscale, family=family), device="cpu")
    result = pipe(Image.new("RGB", size[::-1], "red"))
    assert (result.mode, result.size) == ("RGB", (upscale * size[1], upscale * size[0]))


def test_loads_by_task_from_a_folder(model, photo, tmp_path):
    model.save_pretrained(tmp_path / "model")
    pipe = pipeline("image-restoration", model=str(tmp_path / "model"), device="cpu")
    np.testing.assert_array_equal(np.array(pipe(photo)), reference(model, photo))
    pipe.save_pretrained(tmp_path / "pipe")
    again = pipeline("image-restoration", model=str(tmp_path / "pipe"), device="cpu")
    np.testing.assert_array_equal(np.array(again(photo)), reference(model, photo))


def test_every_form_of_image(pipe, model, photo, tmp_path, httpserver_url):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    expected = reference(model, photo)
    other = photo[:7, :9]
    results = pipe([photo, Image.fromarray(photo), str(path), path, httpserver_url(path), other])
    for result in results[:-1]:
        np.testing.assert_array_equal(np.array(result), expected)
    np.testing.assert_array_equal(np.array(results[-1]), reference(model, other))
    np.testing.assert_array_equal(np.array(pipe((photo,))[0]), expected)


@pytest.fixture
def httpserver_url():
    """Serves files of a folder on this machine."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    servers = []

    def serve(path) -> str:
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(path.parent)))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/{path.name}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_grey_stays_grey(pipe, model, photo):
    grey = Image.fromarray(photo[..., 0])
    result = pipe(grey)
    assert result.mode == "L"
    with torch.no_grad():
        pixel_values = torch.from_numpy(photo[..., 0]).expand(1, 3, -1, -1) / 255
        luma = (model(pixel_values).reconstruction[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert np.abs(np.array(result).astype(int) - to_uint8(luma).numpy()).max() <= 1


def test_a_grey_model_takes_colour_channel_by_channel(photo):
    model = make_model(num_channels=1)
    pipe = pipeline("image-restoration", model=model, device="cpu")
    result = np.array(pipe(photo, tile=8, tile_overlap=4, batch_size=2))
    for channel in range(3):
        alone = np.array(pipe(photo[..., channel], tile=8, tile_overlap=4))
        assert np.abs(result[..., channel].astype(int) - alone).max() <= 1
    assert len({result[..., channel].tobytes() for channel in range(3)}) == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_alpha_is_enlarged_and_does_not_touch_the_colours(pipe, mode, photo):
    alpha = np.full((21, 30, 1), 90, dtype=np.uint8)
    image = Image.fromarray(np.concatenate((photo, alpha), axis=-1)).convert("RGBA" if mode in ("P", "PA") else mode)
    if mode == "PA":
        image = image.convert("RGB").convert("P").convert("PA")
        image.putalpha(90)
    elif mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = bytes([90] * 16)
    result = pipe(image)
    assert result.mode == ("LA" if mode == "LA" else "RGBA")
    assert set(np.array(result.getchannel("A")).flat) == {90}
    opaque = pipe(image.convert("L" if mode == "LA" else "RGB"))
    np.testing.assert_array_equal(np.array(result)[..., :-1].squeeze(), np.array(opaque))


def test_alpha_keeps_its_shape(pipe, photo):
    alpha = np.zeros((21, 30, 1), dtype=np.uint8)
    alpha[:, 15:] = 255
    result = np.array(pipe(np.concatenate((photo, alpha), axis=-1)))[..., 3]
    assert (result[:, :24] == 0).all()
    assert (result[:, 36:] == 255).all()


def test_16_bits_are_kept(model, pipe, tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (9, 11), dtype=np.uint16)
    result = pipe(Image.fromarray(grey))
    assert (result.mode, result.size) == ("I;16", (22, 18))
    assert len(np.unique(np.array(result))) > 256
    path = tmp_path / "grey.png"
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(np.array(pipe(path)), np.array(result))

    colour = rng.integers(0, 65536, (9, 11, 4), dtype=np.uint16)
    result = pipe(colour)
    assert (result.shape, result.dtype) == ((18, 22, 4), np.uint16)
    with torch.no_grad():
        pixel_values = torch.from_numpy(colour[..., :3].astype(np.float32)).permute(2, 0, 1)[None] / 65535
        expected = (model(pixel_values).reconstruction[0].clamp(0, 1) * 65535).round().permute(1, 2, 0).numpy()
    assert np.abs(result[..., :3] - expected).max() <= 1


def png_16_bits(array: np.ndarray, orientation: int | None = None) -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        chunks += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colour_files_and_their_orientation(pipe, tmp_path, orientation):
    colour = np.random.default_rng(0).integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    path = tmp_path / "colour.png"
    path.write_bytes(png_16_bits(colour, orientation))
    with Image.open(path) as opened, pytest.raises(ValueError, match="16 bits per channel"):
        pipe(opened)
    # Pillow's result for the orientation, on an 8-bit image that numbers the pixels.
    numbers = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9))
    numbers.getexif()[0x0112] = orientation
    buffer = io.BytesIO()
    numbers.save(buffer, "PNG", exif=numbers.getexif())
    from PIL import ImageOps

    turned = np.array(ImageOps.exif_transpose(Image.open(buffer)))
    np.testing.assert_array_equal(pipe(path), pipe(colour.reshape(-1, 3)[turned]))


def test_orientation_is_applied(pipe, photo, tmp_path):
    path = tmp_path / "turned.png"
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    result = pipe(path)
    assert result.size == (42, 60)
    np.testing.assert_array_equal(np.array(result), np.array(pipe(np.rot90(photo, -1).copy())))


def test_floating_arrays_come_back_floating(pipe, model, photo):
    result = pipe(photo.astype(np.float64) / 255)
    assert result.dtype == np.float32
    np.testing.assert_array_equal((result * 255).round().astype(np.uint8), reference(model, photo))


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "F", "I"])
def test_other_modes(pipe, photo, mode):
    image = Image.fromarray(photo)
    if mode == "F":
        image = Image.fromarray(photo[..., 0].astype(np.float32) / 255)
    elif mode == "I":
        image = Image.fromarray(photo[..., 0].astype(np.int32) * 256)
    else:
        image = image.convert(mode)
    assert pipe(image).mode == {"1": "L", "F": "F", "I": "I;16"}.get(mode, "RGB")


@pytest.mark.parametrize("blend", ["cut", "mean", "feather"])
def test_a_tile_that_covers_the_image_changes_nothing(pipe, model, photo, blend):
    result = pipe(photo, tile=32, tile_overlap=8, blend=blend)
    np.testing.assert_array_equal(np.array(result), reference(model, photo))


def test_tiles_and_batches_of_tiles(pipe, model, photo):
    photo = np.tile(photo, (2, 2, 1))
    whole = reference(model, photo).astype(int)
    tiled = np.array(pipe(photo, tile=16, tile_overlap=16)).astype(int)
    bare = np.array(pipe(photo, tile=16, tile_overlap=0)).astype(int)
    assert np.abs(tiled - whole).mean() < np.abs(bare - whole).mean() / 2
    batched = np.array(pipe(photo, tile=16, tile_overlap=16, batch_size=4)).astype(int)
    assert np.abs(tiled - batched).max() <= 1


def test_self_ensemble_is_the_average_of_the_turned_images(pipe, model, photo):
    photo = photo[:20, :28]
    with torch.no_grad():
        total = 0
        pixel_values = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        for turns in range(4):
            for flip in ((), (-1,)):
                turned = pixel_values.rot90(turns, (-2, -1)).flip(flip)
                total = total + model(turned).reconstruction.flip(flip).rot90(-turns, (-2, -1))
    expected = to_uint8(total[0] / 8).permute(1, 2, 0).numpy()
    result = np.array(pipe(photo, self_ensemble=True))
    assert np.abs(result.astype(int) - expected).max() <= 1
    assert (result != reference(model, photo)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["hat", "drct"])
def test_half_precision(family, dtype, photo):
    model = make_model(family=family, gain=1)
    whole = reference(model, photo).astype(int)
    pipe = pipeline("image-restoration", model=model.to(dtype), device="cpu")
    assert np.abs(np.array(pipe(photo)).astype(int) - whole).max() <= 1


def test_progress_bar_counts_tiles(pipe, photo, capfd):
    logging.enable_progress_bar()
    try:
        pipe(photo, tile=8, tile_overlap=4)
        assert "12/12" in capfd.readouterr().err
        pipe(photo)
        assert "tile" not in capfd.readouterr().err
        logging.disable_progress_bar()
        pipe(photo, tile=8, tile_overlap=4)
        assert "tile" not in capfd.readouterr().err
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "pixelshuffledirect", "pixelshuffle_aux"])
def test_serves_swin2sr_as_its_own_processor_does(photo, upsampler):
    from transformers import Swin2SRImageProcessor

    torch.manual_seed(0)
    config = Swin2SRConfig(
        embed_dim=8, depths=[2], num_heads=[2], window_size=8, image_size=32, upscale=2, upsampler=upsampler
    )
    model = Swin2SRForImageSuperResolution(config).eval()
    pipe = pipeline("image-restoration", model=model, device="cpu")
    result = np.array(pipe(photo, padding="symmetric"))
    with torch.no_grad():
        inputs = Swin2SRImageProcessor()(Image.fromarray(photo), return_tensors="pt")
        expected = to_uint8(model(**inputs).reconstruction[0, :, :42, :60]).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(result, expected)
    assert pipe(photo, tile=16, tile_overlap=8, batch_size=2).size == (60, 42)


def test_auto_class_finds_the_families(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path)
    assert type(loaded) is HATForImageSuperResolution


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("2GB", 2e9), ("500 MiB", 500 * 2**20), ("1.5g", 1.5e9), (1000, 1000), ("12kb", 12e3)]
)
def test_memory_sizes(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["lots", "", "-1GB", "0", "2 TB"])
def test_no_memory_sizes(text):
    with pytest.raises(ValueError, match="number of bytes or a string"):
        parse_memory(text)


def test_a_budget_chooses_the_largest_tile_that_fits(model, pipe, monkeypatch):
    tiles = []
    monkeypatch.setattr(
        "hf_attn.restoration.tiling.restore_bands", lambda *args, tile, **kwargs: tiles.append(tile) or iter(())
    )
    photo = np.zeros((600, 800, 3), dtype=np.uint8)
    for budget in ("120MB", "160MB", "240MB", "400MB", "100GB"):
        pipe(photo, max_memory=budget, tile_overlap=8)
    assert tiles[-1] is None
    assert sorted(tiles[:-1]) == tiles[:-1]
    assert len(set(tiles)) == len(tiles)
    for tile, budget in zip(tiles, (120e6, 160e6, 240e6, 400e6), strict=False):
        if tile is not None:
            assert tile % 4 == 0
            assert activation_bytes_per_pixel(model) * (tile + 16) ** 2 < budget
    with pytest.raises(ValueError, match=r"does not fit into 0.05 GB: with the smallest tile, 4, it takes about"):
        pipe(photo, max_memory="50MB")


def test_an_image_that_does_not_fit_says_which_tile_to_use(pipe, monkeypatch):
    monkeypatch.setattr("hf_attn.architectures.restoration.memory.available_memory", lambda device: 300_000_000)
    photo = np.zeros((1000, 1000, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"1000x1000 at once takes more than the 0.3 GB.*tile=\d+"):
        pipe(photo)


_MEASURE = """
import sys, threading, time
import numpy as np, psutil, torch
from transformers import pipeline
import hf_attn
from transformers import AutoConfig, AutoModelForImageToImage

torch.set_num_threads(1)
small = {"embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 8, "upscale": 2}
own = {"hat": {"compress_ratio": 4, "squeeze_factor": 4}, "drct": {"growth_channels": 8}}[sys.argv[4]]
config = AutoConfig.for_model(sys.argv[4], **small, **own)
model = AutoModelForImageToImage.from_config(config, dtype=getattr(torch, sys.argv[5]))
pipe = pipeline("image-restoration", model=model.eval(), device="cpu")
pipe(np.zeros((64, 64, 3), dtype=np.uint8))
height, width = int(sys.argv[1]), int(sys.argv[2])
photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
process = psutil.Process()
before, peak, done = process.memory_info().rss, 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
result = pipe(photo, max_memory=sys.argv[3])
done = True
watcher.join()
assert result.size == (2 * width, 2 * height)
print(peak - before, peak)
"""


def measure(height: int, width: int, budget: str, family: str = "hat", dtype: str = "float32") -> tuple[int, int]:
    """Peak memory in bytes during the call, beyond that before it and in total."""
    arguments = (str(height), str(width), budget, family, dtype)
    done = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra, peak = done.stdout.split()[-2:]
    return int(extra), int(peak)


@pytest.mark.parametrize(("family", "dtype"), [("hat", "float32"), ("hat", "bfloat16"), ("drct", "float32")])
def test_a_budget_is_kept(family, dtype):
    extra, _ = measure(300, 400, "300MB", family, dtype)
    assert extra <= 300e6


@pytest.mark.slow
def test_twelve_megapixels_in_four_gigabytes():
    extra, peak = measure(3000, 4000, "2GB")
    assert peak < 4e9
    assert extra < 2e9


def test_work_is_linear_in_the_pixels():
    """Four times the image is four times the tiles, of one size."""
    seen = []
    model = make_model()
    model.forward = lambda pixel_values: (
        seen.append(pixel_values.shape[-2:].numel())
        or ImageSuperResolutionOutput(reconstruction=pixel_values.repeat_interleave(2, -1).repeat_interleave(2, -2))
    )
    pipe = pipeline("image-restoration", model=model, device="cpu")
    work = []
    for height, width in ((300, 400), (600, 800)):
        seen.clear()
        pipe(np.zeros((height, width, 3), dtype=np.uint8), tile=48, tile_overlap=8)
        work.append(sum(seen))
    assert work[1] == pytest.approx(4 * work[0], rel=0.02)


# --- bad input ---------------------------------------------------------------------------------------


def test_corrupt_and_missing_files(pipe, photo, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(photo, (20, 20, 1))).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:20000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut16.png").write_bytes(png_16_bits(np.zeros((50, 50, 3), dtype=np.uint16))[:70])
    for name in ("cut.png", "text.png", "cut16.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: it is corrupt"):
            pipe(tmp_path / name)
    with pytest.raises(ValueError, match="no image file at"):
        pipe(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), dtype=np.uint8), "empty"),
        (Image.new("RGB", (0, 5)), "empty"),
        (np.zeros((5, 5, 5), dtype=np.uint8), r"1 to 4 channels\), got \(5, 5, 5\)"),
        (np.zeros((5,), dtype=np.uint8), "must have the shape"),
        (np.full((5, 5), 2.0), r"must be in \[0, 1\], got values from 2.0"),
        (np.full((5, 5), np.nan), r"must be in \[0, 1\]"),
        (np.zeros((5, 5), dtype=np.int64), "uint8, uint16 or floating-point, got int64"),
        (Image.fromarray(np.full((5, 5), 70000, dtype=np.int32)), "outside the range of 16 bits"),
    ],
)
def test_bad_images(pipe, image, message):
    with pytest.raises(ValueError, match=message):
        pipe(image)


def test_no_image(pipe):
    with pytest.raises(TypeError, match="got int"):
        pipe(3)


def test_bad_parameters(pipe, photo):
    with pytest.raises(ValueError, match="Try 8"):
        pipe(photo, tile=10)
    with pytest.raises(ValueError, match="blend must be one of"):
        pipe(photo, blend="smooth")
    with pytest.raises(ValueError, match="pass only one of them"):
        pipe(photo, tile=8, max_memory="1GB")
    with pytest.raises(TypeError, match="no parameter tile_size"):
        pipe(photo, tile_size=8)


def test_wrong_scale_of_a_checkpoint(photo):
    model = make_model(upscale=2)
    model.config.upscale = 4
    # The output is cropped to the scale of the configuration, which is larger than the network's output.
    with pytest.raises(ValueError, match="does not match upscale=4"):
        pipeline("image-restoration", model=model, device="cpu")(photo)


def test_models_of_other_channels(photo):
    pipe = pipeline("image-restoration", model=make_model(num_channels=4), device="cpu")
    with pytest.raises(ValueError, match="The model has 4 channels"):
        pipe(photo)
