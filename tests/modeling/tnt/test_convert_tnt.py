"""Official and timm checkpoints of TNT."""

import pytest
import torch

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.tnt.configuration_tnt import TNTConfig
from hf_attn.modeling.tnt.modeling_tnt import TNTModel
from tests.batteries.imaging import randomize


timm = pytest.importorskip("timm")

TINY = {
    "img_size": 32,
    "embed_dim": 48,
    "inner_dim": 8,
    "depth": 2,
    "num_heads_inner": 2,
    "num_heads_outer": 3,
    "num_classes": 5,
}
OFFICIAL_NAMES = {
    "patch_pos": "outer_pos",
    "pixel_pos": "inner_pos",
    "pixel_embed": "patch_embed",
    "norm1_proj": "proj_norm1",
    "norm2_proj": "proj_norm2",
    "norm_in": "inner_norm1",
    "attn_in": "inner_attn",
    "norm_mlp_in": "inner_norm2",
    "mlp_in": "inner_mlp",
    "norm_out": "outer_norm1",
    "attn_out": "outer_attn",
    "norm_mlp": "outer_norm2",
    "mlp": "outer_mlp",
}


def official_weights(model) -> dict[str, torch.Tensor]:
    """Weights of timm's model in the official layout."""
    weights = {
        ".".join(OFFICIAL_NAMES.get(part, part) for part in name.split(".")): tensor
        for name, tensor in model.state_dict().items()
    }
    weights["inner_pos"] = weights["inner_pos"].flatten(2).transpose(1, 2)
    weights["outer_tokens"] = torch.randn(1, weights["outer_pos"].shape[1] - 1, weights["outer_pos"].shape[2])
    return weights


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("tnt_s_patch16_224", "tnt_s"),
        ("tnt_b_patch16_224", "tnt_b"),
        ("tnt_s_legacy_patch16_224", "tnt_s_legacy"),
    ],
)
def test_published_size_equals_timm(name, variant):
    reference = randomize(timm.create_model(name))
    model = from_official("tnt", reference.state_dict(), config={"source": "timm"})
    published = TNTConfig.from_variant(variant).to_dict()
    assert {key: value for key, value in model.config.to_dict().items() if key in TNTConfig.variants[variant]} == {
        key: value for key, value in published.items() if key in TNTConfig.variants[variant]
    }
    assert model.num_parameters() == sum(parameter.numel() for parameter in reference.parameters())
    pixel_values = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = reference(pixel_values)
        assert (model(pixel_values).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"mlp_ratio": 2.0}, {"global_pool": "avg"}])
@pytest.mark.parametrize("legacy", [False, True])
def test_options_equal_timm(options, legacy):
    arguments = {**TINY, **options, "legacy": legacy}
    reference = randomize(timm.models.tnt.TNT(**arguments))
    model = from_official("tnt", reference.state_dict(), config=arguments)
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(pixel_values).logits, reference(pixel_values), rtol=1e-5, atol=1e-5)


def test_official_layout_equals_timm():
    reference = randomize(timm.models.tnt.TNT(**TINY))
    weights = official_weights(reference)
    assert "blocks.1.inner_attn.qk.weight" in weights and "blocks.0.proj_norm2.weight" in weights
    model = from_official("tnt", weights, config={"outer_num_heads": 3, "inner_num_heads": 2})
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(pixel_values).logits, reference(pixel_values), rtol=1e-5, atol=1e-5)


def test_squeeze_excitation():
    """No other implementation has it, so the gate on the branch is tested against its definition."""
    weights = official_weights(randomize(timm.models.tnt.TNT(**TINY)))
    for block in range(2):
        for name, shape in (("0.weight", (48,)), ("0.bias", (48,)), ("1.weight", (12, 48)), ("1.bias", (12,))):
            weights[f"blocks.{block}.se_layer.fc.{name}"] = torch.randn(shape)
        weights[f"blocks.{block}.se_layer.fc.3.weight"] = torch.randn(48, 12)
        weights[f"blocks.{block}.se_layer.fc.3.bias"] = torch.randn(48)
    model = from_official("tnt", weights, config={"outer_num_heads": 3, "inner_num_heads": 2, "se": 1})
    assert model.config.squeeze_excitation
    branch = torch.randn(2, 5, 48)
    fc = {name.rsplit("fc.", 1)[1]: tensor for name, tensor in weights.items() if "blocks.0.se_layer" in name}
    mean = torch.nn.functional.layer_norm(branch.mean(1), (48,), fc["0.weight"], fc["0.bias"])
    gate = ((mean @ fc["1.weight"].T + fc["1.bias"]).relu() @ fc["3.weight"].T + fc["3.bias"]).tanh()
    expected = branch * (1 + gate[:, None])
    torch.testing.assert_close(model.tnt.layers[0].squeeze_excitation(branch), expected, rtol=1e-5, atol=1e-5)


def test_without_classifier():
    reference = randomize(timm.models.tnt.TNT(**{**TINY, "num_classes": 0}))
    model = from_official("tnt", reference.state_dict(), config=TINY)
    assert type(model) is TNTModel
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(pixel_values).pooler_output, reference(pixel_values), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named():
    weights = timm.models.tnt.TNT(**TINY).state_dict()
    with pytest.raises(ConversionError, match="the number of heads"):
        from_official("tnt", weights)
    with pytest.raises(ConversionError, match="legacy=False"):
        from_official("tnt", weights, config={**TINY, "legacy": True})
    with pytest.raises(ConversionError, match="keys that tnt does not use: extra"):
        from_official("tnt", {**weights, "extra.weight": torch.zeros(1)}, config=TINY)
    del weights["blocks.1.norm_in.bias"]
    with pytest.raises(ConversionError, match=r"no weights for tnt\.layers\.1\.inner_norm1\.bias"):
        from_official("tnt", weights, config=TINY)
