"""BiFormer: properties from the paper and its code, padding, and bad input."""

import math
from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_attn.architectures.imaging import IMAGENET_MEAN, IMAGENET_STD
from hf_attn.modeling.biformer.configuration_biformer import BiFormerConfig
from hf_attn.modeling.biformer.modeling_biformer import (
    BiFormerBackbone,
    BiFormerForImageClassification,
    BiFormerFullAttention,
    BiFormerModel,
    BiFormerRoutingAttention,
    from_regions,
    to_regions,
)
from tests.batteries.imaging import ImageBackboneTests, ImageFamilyTests, randomize


tiny_config = partial(BiFormerConfig.from_variant, "tiny")


class TestBiFormer(ImageFamilyTests, ImageBackboneTests):
    parameters = {
        "biformer_tiny": 13_142_760,
        "biformer_small": 25_536_232,
        "biformer_base": 56_804_968,
        "biformer_stl": 28_372_552,
        "biformer_stl_nchw": 28_372_552,
    }
    processors = dict.fromkeys(parameters, (256, 224, IMAGENET_MEAN, IMAGENET_STD))
    has_norms = True
    strides = {"stem": 4, "stage1": 4, "stage2": 8, "stage3": 16}
    auxiliary_channels = 24

    def get_config(self, **overrides):
        return tiny_config(**{"auto_pad": True, **overrides})


class TestBiFormerStl(ImageFamilyTests):
    """The later code of the Swin-T layout, which pads after the projection."""

    parameters = TestBiFormer.parameters
    processors = TestBiFormer.processors

    def get_config(self, **overrides):
        return tiny_config(layout="stl_nchw", topks=[1, 3, -1], before_attn_dwconv=0, **overrides)


# --- sizes and costs --------------------------------------------------------------------------------------------------


def giga_macs(config: BiFormerConfig, size: int) -> float:
    with torch.device("meta"):
        model = BiFormerForImageClassification(config).eval()
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("biformer_tiny", 2.216),
        ("biformer_small", 4.464),
        ("biformer_base", 9.759),
        ("biformer_stl", 4.574),
        ("biformer_stl_nchw", 4.574),
    ],
)
def test_cost_of_the_published_variants(variant, expected):
    assert giga_macs(BiFormerConfig.from_variant(variant), 224) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("n_win", "size", "official"), [(7, 256, 7.446), (7, 512, 33.15), (8, 512, 27.72), (16, 512, 23.82)]
)
def test_cost_of_larger_images(n_win, size, official):
    """The official code also projects the padding and crops afterwards; the result is the same."""
    config = BiFormerConfig.from_variant("biformer_small", n_win=n_win, auto_pad=True)
    projected_padding = 0
    for stage in range(3):
        side = size // (4 * 2**stage)
        padded = math.ceil(side / n_win) * n_win
        projected_padding += config.depths[stage] * (padded**2 - side**2) * config.hidden_sizes[stage] ** 2
    assert giga_macs(config, size) + projected_padding / 1e9 == pytest.approx(official, rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "body", "norms"), [("biformer_small", 25_022_208, 1920), ("biformer_base", 56_034_432, 2880)]
)
def test_size_of_the_dense_backbones(variant, body, norms):
    config = BiFormerConfig.from_variant(variant, out_features=["stage1", "stage2", "stage3", "stage4"])
    with torch.device("meta"):
        backbone = BiFormerBackbone(config)
    assert sum(parameter.numel() for parameter in backbone.hidden_states_norms.parameters()) == norms
    assert backbone.num_parameters() == body + norms


def test_heads_and_scales_of_the_published_variants():
    for variant in ("biformer_small", "biformer_base"):
        with torch.device("meta"):
            model = BiFormerModel(BiFormerConfig.from_variant(variant))
        for stage, width in enumerate(model.config.hidden_sizes):
            attention = model.encoder.stages[stage].layers[0].attention
            full = stage == 3
            assert isinstance(attention, BiFormerFullAttention if full else BiFormerRoutingAttention)
            assert attention.num_heads == (8 if full else width // 32)
            assert attention.scaling == pytest.approx((width / 8 if full else width) ** -0.5)
            assert (attention.qkv.bias is None) == full


# --- the mechanism ----------------------------------------------------------------------------------------------------


def routing_attention(**overrides) -> BiFormerRoutingAttention:
    """Bi-level routing attention of width 16 with two heads."""
    torch.manual_seed(0)
    fields = {"hidden_sizes": [16], "depths": [1], "mlp_ratios": [2], "topks": [2], "out_features": None}
    config = tiny_config(**{**fields, **overrides})
    config._attn_implementation = "eager"
    return randomize(BiFormerRoutingAttention(config, stage=0))


def dense_attention(attention: BiFormerRoutingAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """Attention of all tokens to all, written out, with the weights of a routing attention."""
    batch, height, width, channels = hidden_states.shape
    query, key, value = attention.qkv(hidden_states).split(channels, dim=-1)
    heads = [x.reshape(batch, height * width, 2, channels // 2).transpose(1, 2) for x in (query, key, value)]
    scores = heads[0] @ heads[1].transpose(-1, -2) / channels**0.5
    output = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(hidden_states.shape)
    return attention.proj(output + attention.lepe(value))


@pytest.mark.parametrize("layout", ["biformer", "stl_nchw"])
@pytest.mark.parametrize(("n_win", "topk"), [(2, 4), (3, 9), (1, 1)])
def test_all_regions_are_dense_attention(layout, n_win, topk):
    attention = routing_attention(layout=layout, n_win=n_win, topks=[topk])
    hidden_states = torch.randn(2, 6, 6, 16)
    for implementation in ("eager", "sdpa"):
        attention.config._attn_implementation = implementation
        torch.testing.assert_close(attention(hidden_states)[0], dense_attention(attention, hidden_states))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 12)])
def test_tokens_attend_to_the_chosen_regions(height, width):
    """Against dense attention with a mask instead of gathered regions."""
    attention = routing_attention(n_win=2, topks=[2])
    hidden_states = torch.randn(3, height, width, 16)
    query, key, value = attention.qkv(hidden_states).split(16, dim=-1)
    size = (height // 2, width // 2)
    means = [attention.region_means(x, size) for x in (query, key)]
    torch.testing.assert_close(means[0], to_regions(query, size).mean(1).unflatten(0, (3, 4)))
    chosen = torch.zeros(3, 4, 4, dtype=torch.bool)
    chosen.scatter_(2, (means[0] @ means[1].transpose(1, 2)).topk(2).indices, True)

    region_of = torch.arange(2).repeat_interleave(size[0])[:, None] * 2 + torch.arange(2).repeat_interleave(size[1])
    region_of = region_of.flatten()
    allowed = chosen[:, region_of][:, :, region_of]
    heads = [x.reshape(3, height * width, 2, 8).transpose(1, 2) for x in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed[:, None], scale=16**-0.5)
    expected = attention.proj(expected.transpose(1, 2).reshape(hidden_states.shape) + attention.lepe(value))
    output, weights = attention(hidden_states)
    torch.testing.assert_close(output, expected)
    tokens = size[0] * size[1]
    assert weights.shape == (12, 2, tokens, 2 * tokens)


def test_regions_and_back():
    hidden_states = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    regions = to_regions(hidden_states, (3, 2))
    assert torch.equal(regions[1].view(3, 2, 3), hidden_states[0, :3, 2:4])
    assert torch.equal(regions[4].view(3, 2, 3), hidden_states[0, 3:, :2])
    assert torch.equal(from_regions(regions, (3, 2), (6, 8)), hidden_states)


def test_tokens_attended_to_at_224():
    model = BiFormerModel(BiFormerConfig.from_variant("biformer_tiny", depths=[1, 1, 1, 1])).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 224, 224), output_attentions=True, output_routing_indices=True)
    assert [weights.shape[-1] for weights in outputs.attentions] == [64, 64, 64, 49]
    assert [tuple(index.shape) for index in outputs.routing_indices] == [(1, 49, 1), (1, 49, 4), (1, 49, 16)]


def test_outputs_of_every_stage():
    model = BiFormerForImageClassification(tiny_config()).eval()
    model.set_attn_implementation("eager")
    outputs = model(torch.randn(2, 3, 64, 64), output_attentions=True, output_hidden_states=True)
    shapes = [tuple(hidden_states.shape) for hidden_states in outputs.hidden_states]
    assert shapes == [(2, 16, 16, 16), (2, 16, 16, 16), (2, 24, 8, 8), (2, 32, 4, 4)]
    assert [tuple(w.shape) for w in outputs.attentions] == [(8, 2, 64, 64), (8, 3, 16, 48), (2, 8, 16, 16)]
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_layouts_agree_where_regions_divide_the_map_and_nowhere_else():
    legacy = routing_attention(n_win=3, topks=[4], auto_pad=True)
    nchw = routing_attention(n_win=3, topks=[4], layout="stl_nchw")
    nchw.load_state_dict(legacy.state_dict())
    for size, agree in (((9, 6), True), ((10, 13), False)):
        hidden_states = torch.randn(2, *size, 16)
        outputs = [attention(hidden_states)[0] for attention in (legacy, nchw)]
        assert outputs[0].shape == outputs[1].shape == hidden_states.shape
        assert torch.allclose(*outputs, rtol=1e-5, atol=1e-5) == agree


def test_padding_of_the_input_is_attended_to():
    """Keys and values of padded tokens are the biases, and count in the means (`auto_pad`)."""
    attention = routing_attention(n_win=3, topks=[4], auto_pad=True)
    hidden_states = torch.randn(2, 7, 8, 16)
    padded = nn.functional.pad(hidden_states, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(attention(hidden_states)[0], attention(padded)[0][:, :7, :8])


def test_padding_after_the_projection():
    """Regions of the size (H // n_win, W // n_win), so more of them than n_win^2; padded keys have a score of zero."""
    attention = routing_attention(n_win=3, topks=[9], layout="stl_nchw")
    hidden_states = torch.randn(2, 10, 13, 16)
    indices = []
    handle = attention.router.register_forward_hook(lambda module, inputs, output: indices.append((inputs, output[1])))
    with handle:
        output, weights = attention(hidden_states)
    (means, _), index = indices[0]
    assert index.shape == (2, 16, 9) and weights.shape == (32, 2, 12, 108)
    query = attention.qkv(hidden_states)[..., :16]
    torch.testing.assert_close(means[:, 15], query[:, 9:, 12:].mean((1, 2)))
    torch.testing.assert_close(means[:, 3], query[:, :3, 12:].mean((1, 2)))
    assert output.shape == hidden_states.shape


def test_routing_has_no_gradient_unless_asked_for():
    hidden_states = torch.randn(2, 6, 6, 16)
    for overrides, has_gradient in (
        ({}, False),
        ({"soft_routing": True}, False),
        ({"soft_routing": True, "diff_routing": True, "param_routing": True}, True),
    ):
        attention = routing_attention(n_win=3, topks=[4], **overrides)
        seen = []
        handle = attention.router.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output[0])
        )
        with handle:
            attention(hidden_states)[0].sum().backward()
        assert seen[0].requires_grad == has_gradient
        assert attention.qkv.weight.grad[:32].abs().min() > 0
        if has_gradient:
            assert attention.router.linear.weight.grad.abs().max() > 0


def test_soft_routing_weighs_keys_and_values():
    attention = routing_attention(n_win=2, topks=[4], soft_routing=True)
    hidden_states = torch.randn(1, 4, 4, 16)
    recorded = []
    with attention.router.register_forward_hook(lambda module, inputs, output: recorded.append(output)):
        output, _ = attention(hidden_states)
    routing_weights, index = recorded[0]
    query, key, value = (to_regions(x, (2, 2)) for x in attention.qkv(hidden_states).split(16, dim=-1))
    attended = []
    for region in range(4):
        scale = routing_weights[0, region][:, None, None]
        keys, values = ((x[index[0, region]] * scale).flatten(0, 1) for x in (key, value))
        heads = [x.reshape(-1, 2, 8).transpose(0, 1) for x in (query[region], keys, values)]
        attended.append(nn.functional.scaled_dot_product_attention(*heads, scale=0.25).transpose(0, 1).flatten(1))
    expected = from_regions(torch.stack(attended), (2, 2), (4, 4)) + attention.lepe(
        attention.qkv(hidden_states)[..., 32:]
    )
    torch.testing.assert_close(output, attention.proj(expected))


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"kv_pool": "ada_avgpool", "kv_per_wins": [2]}, 4),
        ({"kv_pool": "ada_maxpool", "kv_per_wins": [1]}, 1),
        ({"kv_pool": "avgpool", "kv_downsample_ratios": [2]}, 4),
        ({"kv_pool": "maxpool", "kv_downsample_ratios": [4]}, 1),
    ],
)
def test_pooled_keys_and_values(options, keys):
    attention = routing_attention(n_win=2, topks=[3], **options)
    assert attention(torch.randn(2, 8, 8, 16))[1].shape == (8, 2, 16, 3 * keys)


def test_pooling_of_keys_and_values_is_that_of_regions():
    attention = routing_attention(n_win=2, topks=[4], kv_pool="avgpool", kv_downsample_ratios=[2])
    hidden_states = torch.randn(2, 8, 8, 16)
    query, key, value = attention.qkv(hidden_states).split(16, dim=-1)
    pooled = [nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) for x in (key, value)]
    heads = [x.reshape(2, -1, 2, 8).transpose(1, 2) for x in (query, *pooled)]
    expected = nn.functional.scaled_dot_product_attention(*heads, scale=0.25).transpose(1, 2).reshape(2, 8, 8, 16)
    torch.testing.assert_close(attention(hidden_states)[0], attention.proj(expected + attention.lepe(value)))


@pytest.mark.parametrize(("topk", "layout"), [(-1, "biformer"), (-2, "biformer"), (-1, "stl_nchw")])
def test_full_attention(topk, layout):
    torch.manual_seed(0)
    fields = {"hidden_sizes": [16], "depths": [1], "mlp_ratios": [2], "topks": [topk], "out_features": None}
    config = tiny_config(layout=layout, **fields)
    config._attn_implementation = "sdpa"
    attention = randomize(BiFormerFullAttention(config, stage=0))
    hidden_states = torch.randn(2, 3, 5, 16)
    query, key, value = attention.qkv(hidden_states).chunk(3, dim=-1)
    heads = [x.reshape(2, 15, 8, 2).transpose(1, 2) for x in (query, key, value)]
    scores = (heads[0] @ heads[1].transpose(-1, -2) / 2**0.5).softmax(-1)
    expected = (scores @ heads[2]).transpose(1, 2).reshape(2, 3, 5, 16)
    if topk == -2:
        expected = expected + attention.lepe(hidden_states)
    elif layout == "stl_nchw":
        expected = expected + attention.lepe(value)
    else:
        assert attention.lepe is None
    torch.testing.assert_close(attention(hidden_states)[0], attention.proj(expected))


def test_convolutions_in_place_of_attention():
    model = BiFormerForImageClassification(tiny_config(topks=[0, 1, -2])).eval()
    outputs = model(torch.randn(1, 3, 64, 64), output_routing_indices=True)
    assert len(outputs.routing_indices) == 1
    layer = randomize(model).biformer.encoder.stages[0].layers[0].attention
    hidden_states = torch.randn(1, 4, 4, 16)
    expected = layer.fc2(layer.depthwise_conv(layer.fc1(hidden_states)))
    assert torch.equal(layer(hidden_states)[0], expected) and layer.depthwise_conv.kernel_size == (5, 5)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_order_of_a_block(pre_norm):
    config = tiny_config(pre_norm=pre_norm, layer_scale_init_value=0.5, mlp_dwconv=True)
    layer = randomize(BiFormerModel(config)).encoder.stages[0].layers[0]
    layer.attention.config._attn_implementation = "eager"
    x = torch.randn(2, 4, 4, 16)
    expected = x + layer.position_conv(x)
    if pre_norm:
        expected = expected + layer.attention_scale * layer.attention(layer.norm1(expected))[0]
        expected = expected + layer.mlp_scale * layer.mlp(layer.norm2(expected))
    else:
        expected = layer.norm1(expected + layer.attention_scale * layer.attention(expected)[0])
        expected = layer.norm2(expected + layer.mlp_scale * layer.mlp(expected))
    torch.testing.assert_close(layer(x), expected)


def test_backbone_normalises_its_outputs_and_not_the_chain():
    stages = ["stage1", "stage2", "stage3"]
    backbone = randomize(BiFormerBackbone(tiny_config(out_features=stages)))
    with torch.no_grad():
        for norm in backbone.hidden_states_norms.values():
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    outputs = backbone(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    for feature, hidden_states in zip(outputs.feature_maps, outputs.hidden_states[1:], strict=True):
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), rtol=0, atol=1e-5)
        expected = nn.functional.layer_norm(hidden_states.permute(0, 2, 3, 1), hidden_states.shape[1:2], eps=1e-6)
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), expected)


def test_stochastic_depth_grows_over_all_blocks():
    model = BiFormerModel(tiny_config(depths=[1, 2, 3], drop_path_rate=0.5))
    rates = [layer.drop_path.drop_prob for stage in model.encoder.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_initial_weights():
    torch.manual_seed(0)
    model = BiFormerForImageClassification(tiny_config(hidden_sizes=[64, 64, 64]))
    layer = model.biformer.encoder.stages[0].layers[0]
    for linear in (layer.mlp.fc1, layer.attention.qkv, model.classifier):
        assert linear.weight.abs().max() <= 2.0 and (linear.bias == 0).all()
    assert layer.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    conv = layer.attention.lepe
    assert 0.9 / 5 < conv.weight.detach().abs().max() <= 1 / 5

    nchw = BiFormerForImageClassification(
        tiny_config(layout="stl_nchw", topks=[1, 3, -1], before_attn_dwconv=0, hidden_sizes=[64, 64, 64])
    )
    fc1 = nchw.biformer.encoder.stages[0].layers[0].mlp.fc1
    assert 0.9 / 8 < fc1.weight.detach().abs().max() <= 1 / 8
    assert nchw.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_routing_in_bfloat16_is_computed_in_single_precision():
    attention = routing_attention(n_win=2, topks=[2]).bfloat16()
    means = []
    with attention.router.register_forward_hook(lambda module, inputs, output: means.append(inputs[0])):
        attention(torch.randn(1, 4, 4, 16, dtype=torch.bfloat16))
    assert means[0].dtype == torch.float32


# --- bad input --------------------------------------------------------------------------------------------------------


class TestBadInput:
    def test_image_that_regions_do_not_divide(self):
        model = BiFormerForImageClassification(tiny_config(n_win=7))
        with pytest.raises(ValueError, match=r"16x16 cannot be divided into n_win=7.*auto_pad=True"):
            model(torch.randn(1, 3, 64, 64))

    def test_map_smaller_than_the_regions(self):
        model = BiFormerForImageClassification(
            tiny_config(layout="stl_nchw", n_win=7, topks=[1, 3, -1], before_attn_dwconv=0)
        )
        with pytest.raises(ValueError, match=r"4x4 is smaller than n_win=7"):
            model(torch.randn(1, 3, 32, 32))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"topks": [5, 3, -2]}, r"topks=5 is more than the 4 regions of n_win=2"),
            ({"topks": [-3, 3, -2]}, r"each entry must be at least -2, got -3"),
            ({"topks": [1, 3, -2], "layout": "stl_nchw"}, r"one of \(-1,\)"),
            ({"topks": [1, 3]}, r"one entry per stage, got .*'topks': 2"),
            ({"n_win": [2, 2]}, r"one entry per stage, got .*'n_win': 2"),
            ({"n_win": 0}, r"n_win=0 is out of range: it must be at least 1"),
            ({"head_dim": 32}, r"qk_dims=16 with head_dim=32 results in 0 heads"),
            ({"hidden_sizes": [16, 24, 36]}, r"8 heads, which must divide hidden_sizes=36"),
            ({"kv_pool": "ada_avgpool"}, r"kv_per_wins must have one entry"),
            ({"diff_routing": True}, r"needs soft_routing"),
            ({"soft_routing": True, "param_routing": True}, r"needs diff_routing"),
        ],
    )
    def test_configuration(self, overrides, message):
        with pytest.raises(StrictDataclassError, match=message):
            tiny_config(**overrides)
