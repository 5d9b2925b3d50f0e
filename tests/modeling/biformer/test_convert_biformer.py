"""Checkpoints of the official BiFormer code in each of its layouts; their values are compared by the golden cases."""

from pathlib import Path

import pytest
import torch

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.biformer.configuration_biformer import BiFormerConfig
from hf_attn.modeling.biformer.modeling_biformer import BiFormerBackbone, BiFormerForImageClassification
from tests.goldens import case as golden_case


GOLDENS = Path(golden_case.__file__).parent / "biformer"
LEGACY, NCHW = (golden_case.Case(GOLDENS / name) for name in ("legacy_64px", "stl_nchw_64px"))


def official_names(variant: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a published checkpoint of the layout `"biformer"`, without values."""
    config = BiFormerConfig.from_variant(variant)
    with torch.device("meta"):
        model = BiFormerForImageClassification(config)
    official = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("biformer.")
        for ours, theirs in (
            ("embeddings.", "downsample_layers.0."),
            ("encoder.stages.", "stages."),
            (".layers.", "."),
            ("position_conv", "pos_embed"),
            ("attention.qkv", "attn.qkv" if "stages.3" in name else "attn.qkv.qkv"),
            ("attention.proj", "attn.proj" if "stages.3" in name else "attn.wo"),
            ("attention.lepe", "attn.lepe"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.3"),
            ("classifier", "head"),
        ):
            name = name.replace(ours, theirs)
        if "downsampling" in name:
            stage, rest = name.removeprefix("stages.").split(".downsampling.")
            name = f"downsample_layers.{stage}.{rest}"
        official[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return official


def test_published_checkpoint_needs_no_arguments():
    model = from_official("biformer", {"model": official_names("biformer_tiny")})
    assert isinstance(model, BiFormerForImageClassification)
    assert model.config.topks == BiFormerConfig.from_variant("biformer_tiny").topks
    assert model.config.num_labels == 1000


def test_unpublished_sizes_need_arguments():
    with pytest.raises(ConversionError, match=r"widths \[16, 24, 32, 48\].*`config`"):
        from_official("biformer", LEGACY.weights)


def test_dense_backbone():
    weights = {name: tensor for name, tensor in LEGACY.weights.items() if not name.startswith(("norm.", "head."))}
    for stage, width in enumerate(LEGACY.config["embed_dim"]):
        weights |= {
            f"extra_norms.{stage}.weight": torch.full((width,), 2.0),
            f"extra_norms.{stage}.bias": torch.ones(width),
        }
    backbone = from_official("biformer", weights, config=LEGACY.config)
    assert isinstance(backbone, BiFormerBackbone)
    with torch.no_grad():
        features = backbone(LEGACY.arrays["pixel_values"]).feature_maps
    assert len(features) == 4
    for stage, feature in enumerate(features):
        expected = LEGACY.arrays[f"feature_{stage}"].permute(0, 2, 3, 1)
        expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6) * 2 + 1
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=2e-5)


def test_checkpoint_without_a_head():
    weights = {name: tensor for name, tensor in LEGACY.weights.items() if not name.startswith("head.")}
    model = from_official("biformer", weights, config={**LEGACY.config, "num_classes": 0})
    assert isinstance(model, BiFormerForImageClassification) and model.config.num_labels == 0
    expected = from_official("biformer", LEGACY.weights, config=LEGACY.config)
    with torch.no_grad():
        features = model(LEGACY.arrays["pixel_values"]).logits
        logits = expected(LEGACY.arrays["pixel_values"]).logits
        torch.testing.assert_close(expected.classifier(features), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_attention_alone(stage):
    """Routing attention of the first stage, full attention of the last."""
    whole = from_official("biformer", LEGACY.weights, config=LEGACY.config)
    expected = whole.biformer.encoder.stages[stage].layers[0].attention
    prefix = f"stages.{stage}.0.attn."
    weights = {name.removeprefix(prefix): x for name, x in LEGACY.weights.items() if name.startswith(prefix)}
    config = whole.config
    arguments = {"dim": config.hidden_sizes[stage]}
    if stage == 0:
        heads = config.qk_dims[0] // config.head_dim
        arguments |= {
            "num_heads": heads,
            "n_win": config.n_win[0],
            "topk": config.topks[0],
            "qk_dim": config.qk_dims[0],
        }
    attention = from_official("biformer", weights, config=arguments)
    side = 2 * config.n_win[stage]
    hidden_states = torch.randn(2, side, side, config.hidden_sizes[stage])
    with torch.no_grad():
        torch.testing.assert_close(attention(hidden_states)[0], expected(hidden_states)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="side_dwconv"):
        from_official("biformer", weights, config={**arguments, "side_dwconv": 7})


def test_channels_last_code_of_the_swin_layout():
    """The weights of the other code with its names; both agree where regions divide the map, up to full attention."""
    weights = {}
    for name, tensor in NCHW.weights.items():
        if name.startswith("stages.3.blocks.0.attn.lepe"):
            continue
        name = name.replace("qkv_linear", "qkv.qkv").replace("output_linear", "wo")
        is_linear = name.endswith("weight") and any(part in name for part in (".attn.qkv", ".wo", ".proj", ".mlp."))
        weights[name] = tensor.flatten(1) if is_linear else tensor
    model = from_official("biformer", weights, config=NCHW.config)
    assert model.config.layout == "stl" and model.config.kv_pool is None
    with torch.no_grad():
        features = model(NCHW.arrays["pixel_values"], output_hidden_states=True).hidden_states[1:]
    for stage in range(3):
        torch.testing.assert_close(features[stage], NCHW.arrays[f"feature_{stage}"], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(features[3], NCHW.arrays["feature_3"], atol=1e-3)


def test_routing_with_weights_of_its_own():
    weights = dict(LEGACY.weights)
    for stage, width in enumerate(LEGACY.config["embed_dim"][:3]):
        for layer in range(LEGACY.config["depth"][stage]):
            router = f"stages.{stage}.{layer}.attn.router.emb."
            # The identity chooses the same regions as without a projection.
            weights |= {f"{router}weight": torch.eye(width), f"{router}bias": torch.zeros(width)}
    options = {"soft_routing": True, "diff_routing": True, "param_routing": True}
    model = from_official("biformer", weights, config={**LEGACY.config, **options})
    with torch.no_grad():
        outputs = model(LEGACY.arrays["pixel_values"], output_routing_indices=True)
    assert len(outputs.routing_indices) == 4 and outputs.logits.isfinite().all()


def test_missing_argument_is_named():
    config = {name: value for name, value in LEGACY.config.items() if name != "topks"}
    with pytest.raises(ConversionError, match="topks"):
        from_official("biformer", LEGACY.weights, config=config)


@pytest.mark.parametrize("case", [LEGACY, NCHW], ids=lambda case: case.name)
def test_leftovers_and_gaps_are_named(case):
    with pytest.raises(ConversionError, match=r"stages\.0\.surprise"):
        from_official("biformer", {**case.weights, "stages.0.surprise": torch.zeros(1)}, config=case.config)
    weights = {name: tensor for name, tensor in case.weights.items() if "norm2.bias" not in name}
    with pytest.raises(ConversionError, match=r"no weights for .*norm2\.bias"):
        from_official("biformer", weights, config=case.config)


def test_arguments_that_would_change_the_function():
    with pytest.raises(ConversionError, match=r"qk_scale=0\.1 is not supported"):
        from_official("biformer", LEGACY.weights, config={**LEGACY.config, "qk_scale": 0.1})


def test_another_model():
    with pytest.raises(ConversionError, match="not a checkpoint of BiFormer"):
        from_official("biformer", {"layers.0.weight": torch.zeros(1)})
