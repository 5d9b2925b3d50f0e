"""RMT: properties from the paper, both forms of its attention, and the tests of every image family."""

import math
import random
from functools import partial

import pytest
import torch
from torch import nn

from hf_attn.architectures.imaging import IMAGENET_MEAN, IMAGENET_STD, image_processor_for
from hf_attn.modeling.rmt.configuration_rmt import RMTConfig
from hf_attn.modeling.rmt.modeling_rmt import (
    RMTAttention,
    RMTBackbone,
    RMTForImageClassification,
    RMTModel,
    RMTPositions,
    RMTRelativePositions,
)
from hf_attn.modeling.rmt.token_labeling import (
    draw_box,
    mixed_tokens,
    position_grid,
    token_labeling_loss,
    unmix_token_logits,
)
from tests.batteries.imaging import ImageBackboneTests, ImageFamilyTests, randomize


tiny_config = partial(RMTConfig.from_variant, "tiny")


class TestRMT(ImageFamilyTests, ImageBackboneTests):
    parameters = {
        "rmt_t": 14_334_216,
        "rmt_s": 26_967_240,
        "rmt_b": 54_154_896,
        "rmt_l": 95_464_864,
        "rmt_s_token_label": 27_480_240,
        "rmt_b_token_label": 54_667_896,
        "rmt_l_token_label": 96_105_864,
    }
    processors = {
        name: (233 if "token_label" in name else 256, 224, IMAGENET_MEAN, IMAGENET_STD) for name in parameters
    }
    has_norms = True
    strides = {"stem": 4, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    auxiliary_channels = 16

    def get_config(self, **overrides):
        return tiny_config(**overrides)


def test_large_images_are_not_cropped():
    processor = image_processor_for(RMTConfig.from_variant("rmt_s", image_size=384))
    assert processor.size.shortest_edge == processor.crop_size.height == 384


@pytest.mark.parametrize(
    ("variant", "backbone_parameters", "giga_macs"),
    [
        ("rmt_t", 12_781_856, {224: 2.637, 512: 18.110}),
        ("rmt_s", 25_414_880, {224: 4.777, 384: 14.575, 512: 26.716}),
        ("rmt_b", 52_602_536, {224: 10.373}),
        ("rmt_l", 93_781_432, {224: 19.488}),
    ],
)
def test_cost_of_the_published_variants(variant, backbone_parameters, giga_macs):
    with torch.device("meta"):
        model = RMTForImageClassification(RMTConfig.from_variant(variant)).eval()
        model.set_attn_implementation("eager")
        for size, expected in giga_macs.items():
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, size, size))
            assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=0.0006)
    assert model.rmt.num_parameters() == backbone_parameters


def relative_positions(axis_decomposed: bool, num_heads: int = 3) -> RMTRelativePositions:
    return RMTRelativePositions(8, num_heads, 2, 4, axis_decomposed=axis_decomposed)


def test_decay_of_the_first_stage():
    stage = RMTModel(RMTConfig.from_variant("rmt_t")).encoder.stages[0]
    decay = stage.relative_positions.log_decay().exp()
    torch.testing.assert_close(decay, torch.tensor([0.75, 0.875, 0.9375, 0.96875]))


def test_masks_are_the_powers_of_the_decay():
    positions = relative_positions(axis_decomposed=False)
    mask = positions.full_mask(3, 4).exp()
    gamma = [1 - 2 ** (-2 - 4 * head / 3) for head in range(3)]
    for head in range(3):
        for n in range(12):
            for m in range(12):
                distance = abs(n // 4 - m // 4) + abs(n % 4 - m % 4)
                assert mask[head, n, m] == pytest.approx(gamma[head] ** distance, rel=1e-5)


def test_full_mask_is_the_kronecker_product_of_the_axes():
    positions = relative_positions(axis_decomposed=False)
    of_rows, of_columns = positions.axis_mask(5).exp(), positions.axis_mask(7).exp()
    for head, mask in enumerate(positions.full_mask(5, 7).exp()):
        torch.testing.assert_close(mask, torch.kron(of_rows[head], of_columns[head]), rtol=1e-5, atol=1e-7)


def test_angles_reach_their_end_and_positions_are_those_of_the_raster():
    positions = relative_positions(axis_decomposed=True)
    angles = positions.angles()
    assert angles[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(angles[-2:], torch.full((2,), 1e-4))
    tables = positions(torch.zeros(1, 3, 5, 24))
    torch.testing.assert_close(tables.sin[2, 4], torch.sin(14 * angles))


def test_tables_do_not_depend_on_the_dtype_of_the_model():
    positions = relative_positions(axis_decomposed=False)
    exact, rounded = (positions(torch.zeros(1, 20, 30, 24, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.cos.dtype == torch.bfloat16
    assert torch.equal(rounded.cos, exact.cos.bfloat16()) and torch.equal(rounded.masks[0], exact.masks[0].bfloat16())


@pytest.fixture
def attention():
    return randomize(RMTAttention(RMTConfig(attn_implementation="eager"), hidden_size=24, num_heads=3))


def test_full_form_is_the_equation_of_the_paper_with_rows_normalised(attention):
    """softmax(Q K^T) multiplied by the decay, each row divided by its sum."""
    hidden_states = torch.randn(2, 3, 5, 24)
    tables = relative_positions(axis_decomposed=False)(hidden_states)
    unrotated = RMTPositions(torch.ones(3, 5, 8), torch.zeros(3, 5, 8), tables.masks)
    query, key, value = (
        projection(hidden_states).flatten(1, 2).unflatten(-1, (3, 8)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (query @ key.mT / math.sqrt(8)).softmax(-1) * tables.masks[0].exp()
    weights = weights / weights.sum(-1, keepdim=True)
    output = (weights @ value).transpose(1, 2).flatten(2).unflatten(1, (3, 5))
    expected = attention.o_proj(output + attention.local_enhancement(attention.v_proj(hidden_states)))
    torch.testing.assert_close(attention(hidden_states, unrotated)[0], expected, rtol=1e-5, atol=1e-5)


def test_without_decay_and_rotation_it_is_plain_attention(attention):
    hidden_states = torch.randn(2, 3, 5, 24)
    plain = RMTPositions(torch.ones(3, 5, 8), torch.zeros(3, 5, 8), (torch.zeros(3, 15, 15),))
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(attention.o_proj.state_dict())
    tokens = hidden_states.flatten(1, 2)
    enhancement = attention.local_enhancement(attention.v_proj(hidden_states)) @ attention.o_proj.weight.T
    expected = reference(tokens, tokens, tokens)[0].unflatten(1, (3, 5)) + enhancement
    torch.testing.assert_close(attention(hidden_states, plain)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "same"), [(1, 9, True), (9, 1, True), (3, 5, False)])
def test_both_forms_agree_on_one_line_only(attention, height, width, same):
    hidden_states = torch.randn(2, height, width, 24)
    full, axis = (
        attention(hidden_states, relative_positions(axis_decomposed)(hidden_states))[0]
        for axis_decomposed in (False, True)
    )
    assert torch.allclose(full, axis, rtol=1e-5, atol=1e-5) is same


@pytest.mark.parametrize("axis_decomposed", [False, True])
def test_weights_are_what_the_values_are_multiplied_by(attention, axis_decomposed):
    hidden_states = torch.randn(2, 3, 5, 24)
    tables = relative_positions(axis_decomposed)(hidden_states)
    output, weights = attention(hidden_states, tables, output_attentions=True)
    assert weights.shape == (2, 3, 15, 15)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 15))
    value = attention.v_proj(hidden_states)
    heads = value.flatten(1, 2).unflatten(-1, (3, 8)).transpose(1, 2)
    mixed = (weights @ heads).transpose(1, 2).flatten(2).unflatten(1, (3, 5))
    expected = attention.o_proj(mixed + attention.local_enhancement(value))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_cost_of_both_forms():
    def flops(axis_decomposed: bool, side: int) -> int:
        with torch.device("meta"):
            attention = RMTAttention(RMTConfig(attn_implementation="eager"), hidden_size=24, num_heads=3)
            hidden_states = torch.empty(1, side, side, 24)
            tables = relative_positions(axis_decomposed)(hidden_states)
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                attention(hidden_states, tables)
        projections = 4 * 2 * side**2 * 24**2 + 2 * side**2 * 24 * 25
        return counter.get_total_flops() - projections

    assert flops(False, 12) == 2 * 2 * 12**4 * 24
    assert flops(True, 12) == 2 * 2 * 12**2 * (12 + 12) * 24


def test_recorded_outputs():
    model = randomize(RMTForImageClassification(tiny_config()))
    model.set_attn_implementation("eager")
    outputs = model(torch.randn(2, 3, 64, 90), output_hidden_states=True, output_attentions=True)
    sizes = [(8, 16, 23), (8, 16, 23), (16, 8, 12), (16, 4, 6), (24, 2, 3)]
    assert [tuple(h.shape[1:]) for h in outputs.hidden_states] == sizes
    expected = [(2, 1, 368, 368), (2, 2, 96, 96), (2, 2, 24, 24), (2, 2, 24, 24), (2, 3, 6, 6)]
    assert [tuple(a.shape) for a in outputs.attentions] == expected


def test_feature_maps_are_normalised():
    backbone = RMTBackbone(tiny_config(out_features=["stem", "stage2", "stage4"])).eval()
    assert set(backbone.feature_norms) == {"stage2", "stage4"}
    _, *features = backbone(torch.randn(2, 3, 64, 64)).feature_maps
    for feature in features:
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), rtol=0, atol=1e-5)


def test_token_labeling():
    model = randomize(RMTForImageClassification(tiny_config(token_labeling=True)))
    pixel_values, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 1, 0])
    hidden_states = model.rmt(pixel_values).last_hidden_state
    of_image = model.classifier(model.head(hidden_states))
    of_tokens = model.token_classifier(hidden_states.flatten(2).mT)
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.class_logits, of_image)
    torch.testing.assert_close(outputs.token_logits, of_tokens)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(outputs.logits, of_image + 0.5 * of_tokens.max(dim=1).values)

    outputs = model.train()(pixel_values, labels=labels)
    assert outputs.token_logits.shape == (4, 4, 2)
    expected = nn.functional.cross_entropy(outputs.logits, labels) + 0.5 * nn.functional.cross_entropy(
        outputs.token_logits.flatten(0, 1), labels.repeat_interleave(4)
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_tokens_are_mixed_after_the_stem_and_back():
    model = randomize(RMTForImageClassification(tiny_config(token_labeling=True)))
    pixel_values = torch.randn(3, 3, 64, 130)
    assert position_grid(model, pixel_values) == (2, 5)
    plain = model(pixel_values)
    with mixed_tokens(model, (0, 0, 2, 5)):
        swapped = model(pixel_values)
    # If the box covers the whole map, the images are in reverse order.
    torch.testing.assert_close(swapped.token_logits, plain.token_logits.flip(0))
    unmixed = unmix_token_logits(swapped.token_logits, (0, 0, 2, 5), width=5)
    torch.testing.assert_close(unmixed, plain.token_logits)
    assert torch.equal(model(pixel_values).token_logits, plain.token_logits)

    scores = torch.arange(30.0).view(3, 10, 1)
    mixed = unmix_token_logits(scores, (0, 1, 1, 3), width=5)
    assert mixed[..., 0].tolist() == [[0, 21, 22, *range(3, 10)], [*range(10, 20)], [20, 1, 2, *range(23, 30)]]


def test_boxes_have_every_area():
    generator = random.Random(0)
    boxes = [draw_box(7, 7, generator) for _ in range(2000)]
    areas = [(bottom - top) * (right - left) / 49 for top, left, bottom, right in boxes]
    assert min(areas) == 0 and max(areas) > 0.7
    # Boxes are clipped at the border, so the mean is below a half.
    assert 0.2 < sum(areas) / len(areas) < 0.4
    assert all(0 <= top <= bottom <= 7 and 0 <= left <= right <= 7 for top, left, bottom, right in boxes)


def test_loss_of_token_labels():
    class_logits, token_logits = torch.randn(4, 5), torch.randn(4, 6, 5)
    labels = torch.tensor([0, 1, 1, 4])
    targets = nn.functional.one_hot(labels, 5).float()
    loss = token_labeling_loss(class_logits, token_logits, targets)
    of_tokens = nn.functional.cross_entropy(token_logits.flatten(0, 1), labels.repeat_interleave(6))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(class_logits, labels) + 0.5 * of_tokens)
    with pytest.raises(ValueError, match=r"\(4, 5\) or \(4, 5, 8\), got \(4, 5, 7\)"):
        token_labeling_loss(class_logits, token_logits, torch.rand(4, 5, 7))
    with pytest.raises(ValueError, match="with_ground_truth needs"):
        token_labeling_loss(class_logits, token_logits, targets, with_ground_truth=True)


def test_initial_weights():
    model = RMTForImageClassification(RMTConfig.from_variant("rmt_b"))
    layer = model.rmt.encoder.stages[3].layers[0]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(layer.layer_scale1, torch.full((512,), 1e-6))
    assert model.rmt.encoder.stages[1].layers[0].layer_scale1 is None
    bound = 1 / 5
    assert layer.attention.local_enhancement.conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 1, 1]}, "one entry for each stage"),
        ({"num_attention_heads": [1, 2, 2, 8]}, r"hidden_sizes\[3\] \(24\) must be a multiple of twice"),
        ({"hidden_sizes": [8.5, 16, 16, 24]}, "hidden_sizes"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields, out_features=None)
