"""Tests of every image classifier of the catalogue."""

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForImageToImage

from hf_attn import SigmaReparamViTConfig
from hf_attn.architectures.imaging import ImagePreprocessingMixin, image_processor_for
from hf_attn.catalog import families
from hf_attn.checkpoints.official import from_official
from tests.batteries.families import tiny_config
from tests.batteries.imaging import randomize


FAMILIES = [family.model_type for family in families() if "AutoModelForImageClassification" in family.models]
every_family = pytest.mark.parametrize("model_type", FAMILIES)


def classifier(model_type: str, **overrides) -> torch.nn.Module:
    return randomize(AutoModelForImageClassification.from_config(tiny_config(model_type, **overrides)))


def images(config, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, config.num_channels, config.image_size, config.image_size, generator=generator)


@every_family
def test_float32_images_in_a_bfloat16_model(model_type):
    model = classifier(model_type).bfloat16()
    pixel_values = images(model.config)
    logits = model(pixel_values).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, model(pixel_values.bfloat16()).logits)


@every_family
def test_what_is_no_batch_of_images_is_refused(model_type):
    model = classifier(model_type)
    pixel_values = images(model.config)
    for wrong, message in (
        (pixel_values[:0], r"pixel_values is empty: its shape is \(0, 3"),
        (pixel_values[0], "batch dimension"),
        (pixel_values[:, :2], "num_channels=3"),
        ((100 * pixel_values).to(torch.uint8), r"floating-point numbers .* got torch\.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            model(wrong)


@every_family
def test_no_labels_is_no_classifier(model_type, tmp_path):
    model = classifier(model_type, num_labels=0)
    pixel_values = images(model.config)
    features = model(pixel_values).logits
    assert features.ndim == 2 and features.shape[-1] > 2
    with pytest.raises(ValueError, match="num_labels=0"):
        model(pixel_values, labels=torch.tensor([0, 0]))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.num_labels == 0 and not info["missing_keys"]
    torch.testing.assert_close(again(pixel_values).logits, features)


@every_family
def test_greyscale_images(model_type):
    config = tiny_config(model_type, num_channels=1)
    model = randomize(AutoModelForImageClassification.from_config(config))
    assert torch.isfinite(model(images(config)).logits).all()
    with pytest.raises(ValueError, match="num_channels=1"):
        model(torch.randn(2, 3, config.image_size, config.image_size))
    if not isinstance(config, ImagePreprocessingMixin):
        return
    pixels = np.random.default_rng(0).integers(0, 256, (90, 100), dtype=np.uint8)
    pixel_values = image_processor_for(config)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 1, config.image_size, config.image_size)
    assert torch.isfinite(model(pixel_values).logits).all()


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("biformer", {"layout": "stl_nchw", "topks": [1, 3, -1], "before_attn_dwconv": 0}), ("hat", {}), ("drct", {})],
)
def test_what_depends_on_the_size_is_not_exported_with_a_free_size(model_type, overrides):
    config = tiny_config(model_type, **overrides)
    main_class = AutoModelForImageClassification if model_type == "biformer" else AutoModelForImageToImage
    model = main_class.from_config(config).eval()
    free = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    images = torch.randn(1, 3, 64, 96)
    with pytest.raises(
        Exception, match=r"cannot be exported with dynamic height and width\. .* Export it for a fixed size"
    ):
        torch.export.export(model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": free}, strict=False)


#: family -> (the size to trace with, three others)
SIZES = {
    "rmt": ((64, 96), (96, 64), (70, 50), (128, 100)),
    # A side of length 1 would be exported as constant.
    "shvit": ((128, 192), (192, 128), (150, 70), (256, 128)),
    "biformer": ((64, 96), (96, 64), (32, 32), (128, 96)),
    "activator": ((16, 24), (24, 16), (8, 8), (32, 40)),
}


@every_family
def test_onnx_computes_the_same_at_other_sizes(model_type, tmp_path):
    """Dynamic batch size in all families; dynamic height and width in families that accept other image sizes."""
    model = classifier(model_type)
    model.config.return_dict = True
    side = model.config.image_size
    traced, *sizes = SIZES.get(model_type, ((side, side),))
    dims = (0, 2, 3) if sizes else (0,)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (),
        path,
        kwargs={"pixel_values": torch.randn(2, 3, *traced)},
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": dict.fromkeys(dims, torch.export.Dim.DYNAMIC)},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch_size, size in ((2, traced), *zip((1, 3, 5), sizes or [traced] * 3, strict=True)):
        pixel_values = torch.randn(batch_size, 3, *size)
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4, msg=f"{size}")


def test_vision_transformers_of_imagenet_know_their_classes():
    timm = pytest.importorskip("timm")
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 1000}
    timm_model = timm.models.VisionTransformer(**vit)
    converted = from_official("path_ensemble", timm_model.state_dict(), config={"library": "timm", **vit}).config
    for config in (converted, SigmaReparamViTConfig.from_variant("vit_base_patch16_224")):
        assert config.num_labels == 1000 and config.id2label[1] == "goldfish, Carassius auratus"
    assert SigmaReparamViTConfig.from_variant("vit_base_patch16_224", num_labels=3).id2label[0] == "LABEL_0"
