"""Official and timm checkpoints of SHViT."""

import pytest
import torch

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.shvit.configuration_shvit import SHViTConfig
from hf_attn.modeling.shvit.modeling_shvit import SHViTModel
from tests.batteries.imaging import randomize


timm = pytest.importorskip("timm")

TINY = {"embed_dim": (16, 24, 32), "depth": (1, 1, 2), "partial_dim": (4, 8, 8), "types": ("i", "s", "s")}


def official_name(name: str) -> str:
    """Official name of a tensor of timm's model (the inverse of timm's renaming)."""
    parts = name.split(".")
    if parts[0] != "stages":
        return name
    stage, where, index, *rest = int(parts[1]), *parts[2:]
    if where == "blocks":
        index = int(index) + (3 if stage else 0)
        return ".".join([f"blocks{stage + 1}", str(index), *rest])
    position = {"0": "0.0", "1": "0.1", "2": "1", "3": "2.0", "4": "2.1"}[index]
    return ".".join([f"blocks{stage + 1}", position, *rest])


@pytest.mark.parametrize("variant", SHViTConfig.variants)
def test_published_size_equals_timm(variant):
    reference = randomize(timm.create_model(variant))
    model = from_official("shvit", reference.state_dict(), config={"source": "timm"})
    published = SHViTConfig.from_variant(variant)
    for name in ("hidden_sizes", "depths", "partial_dims", "qk_dims", "block_types", "image_size", "num_labels"):
        assert list_or_value(getattr(model.config, name)) == list_or_value(getattr(published, name)), name
    pixel_values = torch.randn(1, 3, published.image_size, published.image_size)
    with torch.no_grad():
        expected = reference(pixel_values)
        assert (model(pixel_values).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def list_or_value(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_official_layout(key):
    reference = randomize(timm.models.shvit.SHViT(num_classes=5, **TINY))
    weights = {official_name(name): tensor for name, tensor in reference.state_dict().items()}
    assert "blocks2.0.1.m.pw1.c.weight" in weights and "blocks3.4.mixer.m.proj.1.c.weight" in weights
    checkpoint = weights if key is None else {key: weights, "epoch": 299}
    model = from_official("shvit", checkpoint, config={"num_classes": 5, **TINY})
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(pixel_values).logits, reference(pixel_values), rtol=1e-5, atol=1e-5)


def test_distillation_head():
    weights = timm.models.shvit.SHViT(num_classes=5, **TINY).state_dict()
    weights |= {name.replace("head.", "head_dist."): -tensor for name, tensor in weights.items() if "head." in name}
    model = from_official("shvit", weights)
    assert model.config.distillation
    assert torch.equal(model.distillation_classifier.dense.weight, -model.classifier.dense.weight)


@pytest.mark.parametrize("num_classes", [5, 0])
@pytest.mark.parametrize("layout", ["timm", "official"])
def test_folded_checkpoint(layout, num_classes):
    reference = randomize(timm.models.shvit.SHViT(num_classes=num_classes, **TINY))
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(pixel_values)
        reference.fuse()
        torch.testing.assert_close(reference(pixel_values), expected, rtol=1e-4, atol=1e-4)
    weights = reference.state_dict()
    assert "patch_embed.0.weight" in weights and not any("bn" in name for name in weights)
    if layout == "official":
        weights = {official_name(name): tensor for name, tensor in weights.items()}
    model = from_official("shvit", weights)
    assert model.config.fused and not model.training
    outputs = model(pixel_values)
    found = outputs.logits if num_classes else outputs.pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_without_a_head():
    reference = randomize(timm.models.shvit.SHViT(num_classes=0, **TINY))
    model = from_official("shvit", reference.state_dict())
    assert isinstance(model, SHViTModel)
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(pixel_values).pooler_output, reference(pixel_values), rtol=1e-5, atol=1e-5)


def test_left_over_and_missing_keys_are_named():
    weights = timm.models.shvit.SHViT(num_classes=5, **TINY).state_dict()
    with pytest.raises(ConversionError, match="keys that shvit does not use: extra"):
        from_official("shvit", {**weights, "extra.weight": torch.zeros(1)})
    del weights["stages.1.blocks.0.mixer.m.pre_norm.bias"]
    with pytest.raises(ConversionError, match=r"no weights for .*stages.1.layers.0.attention.norm.bias"):
        from_official("shvit", weights)


def test_configuration_has_to_agree():
    weights = timm.models.shvit.SHViT(num_classes=5, **TINY).state_dict()
    with pytest.raises(ConversionError, match=r"depth=\[1, 1, 2\], but the configuration says \[1, 1, 1\]"):
        from_official("shvit", weights, config={"depth": [1, 1, 1]})
    with pytest.raises(ConversionError, match="not an SHViT checkpoint"):
        from_official("shvit", {"weight": torch.zeros(1)})
