"""Official checkpoints of RMT: cases beyond the goldens. There is no other implementation to compare with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.rmt.configuration_rmt import RMTConfig
from hf_attn.modeling.rmt.convert_rmt import OUR_NAMES
from hf_attn.modeling.rmt.modeling_rmt import RMTBackbone, RMTForImageClassification
from tests.goldens.case import Case


CASE = Path(__file__).parents[2] / "goldens" / "rmt" / "small_64px"


@pytest.fixture
def weights():
    return load_file(CASE / "weights.safetensors")


@pytest.fixture
def config():
    return Case(CASE).config


def test_dense_model(weights, config):
    """`extra_norms` in place of the head: feature maps before the downsampling, each normalised."""
    classifier = from_official("rmt", weights, config=config)
    for name in list(weights):
        if name.startswith(("proj.", "norm.", "head.")):
            del weights[name]
    for stage, width in enumerate(config["embed_dims"]):
        weights[f"extra_norms.{stage}.weight"] = torch.randn(width)
        weights[f"extra_norms.{stage}.bias"] = torch.randn(width)
    pixel_values = torch.randn(2, 3, 64, 64)
    hidden_states = classifier(pixel_values, output_hidden_states=True).hidden_states
    for indices in (range(4), (1, 3)):
        backbone = from_official("rmt", weights, config={**config, "out_indices": indices})
        assert type(backbone) is RMTBackbone
        features = backbone(pixel_values).feature_maps
        assert len(features) == len(indices)
        for stage, feature in zip(indices, features, strict=True):
            expected = torch.nn.functional.layer_norm(
                hidden_states[stage + 1].permute(0, 2, 3, 1),
                (config["embed_dims"][stage],),
                weights[f"extra_norms.{stage}.weight"],
                weights[f"extra_norms.{stage}.bias"],
                eps=1e-5,
            )
            torch.testing.assert_close(feature.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


def test_checkpoint_without_a_head(weights, config):
    expected = from_official("rmt", weights, config=config)
    for name in ("head.weight", "head.bias"):
        del weights[name]
    model = from_official("rmt", weights, config={**config, "num_classes": 0})
    assert type(model) is RMTForImageClassification and model.config.num_labels == 0
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(expected.classifier(model(pixel_values).logits), expected(pixel_values).logits)


def test_token_label_head(weights, config):
    weights["aux_head.weight"], weights["aux_head.bias"] = torch.randn(6, 48), torch.randn(6)
    model = from_official("rmt", weights, config=config)
    assert model.config.token_labeling
    assert torch.equal(model.token_classifier.weight, weights["aux_head.weight"])

    weights["aux_head.weight"] = torch.randn(6, 40)
    with pytest.raises(ConversionError, match="aux_head takes 40 features, but the last stage has 48"):
        from_official("rmt", weights, config=config)


def test_published_variant_needs_no_configuration():
    published = RMTConfig.from_variant("rmt_t")
    state = RMTForImageClassification(published).state_dict()
    weights = {official_name(name): tensor for name, tensor in state.items()}
    assert {OUR_NAMES(name) for name in weights} == {name.removeprefix("rmt.") for name in state}
    model = from_official("rmt", weights)
    assert {name: value for name, value in model.config.to_dict().items() if name in RMTConfig.variants["rmt_t"]} == {
        name: value for name, value in published.to_dict().items() if name in RMTConfig.variants["rmt_t"]
    }
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def official_name(name: str) -> str:
    """Official name of one of our tensors."""
    parts = name.removeprefix("rmt.").split(".")
    if parts[0] == "embeddings":
        place = 3 * int(parts[2]) + (parts[3] == "norm")
        return f"patch_embed.proj.{place}.{parts[4]}"
    if parts[:2] == ["encoder", "stages"] and parts[3] == "downsampling":
        layer = {"conv": "reduction", "norm": "norm"}[parts[4]]
        return f"layers.{int(parts[2]) - 1}.downsample.{layer}.{parts[5]}"
    name = ".".join(parts)
    for ours, official in (
        ("encoder.stages.", "layers."),
        (".layers.", ".blocks."),
        (".norm1.", ".retention_layer_norm."),
        (".norm2.", ".final_layer_norm."),
        (".mlp.depthwise_conv.", ".ffn.dwconv."),
        (".mlp.", ".ffn."),
        (".attention.local_enhancement.", ".retention.lepe."),
        (".attention.o_proj.", ".retention.out_proj."),
        (".attention.", ".retention."),
        (".position_conv.", ".pos."),
        ("head.projection.", "proj."),
        ("head.norm.", "norm."),
        ("classifier.", "head."),
    ):
        name = name.replace(ours, official)
    return name


def test_what_does_not_fit_is_named(weights, config):
    with pytest.raises(ConversionError, match="num_heads"):
        from_official("rmt", weights)
    with pytest.raises(ConversionError, match=r"layers\.0\.Relpos\.decay does not match the configuration"):
        from_official("rmt", weights, config={**config, "heads_ranges": [3, 4, 6, 6]})
    with pytest.raises(ConversionError, match="keys that rmt does not use: extra"):
        from_official("rmt", {**weights, "extra.weight": torch.zeros(1)}, config=config)
    with pytest.raises(ConversionError, match="not an official layout of RMT"):
        from_official("rmt", {"weight": torch.zeros(1)})
    del weights["layers.2.blocks.1.pos.conv.bias"]
    with pytest.raises(ConversionError, match=r"no weights for .*stages\.2\.layers\.1\.position_conv\.conv\.bias"):
        from_official("rmt", weights, config=config)
