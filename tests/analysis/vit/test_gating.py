"""Several ways to remove heads agree, in every supported model."""

from functools import partial

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification, SwinConfig, SwinModel

from hf_attn.analysis.vit import (
    ViTLayout,
    cut_heads,
    partial_mask,
    without_attention,
    without_heads,
    zero_heads,
    zeroed_heads,
)
from hf_attn.analysis.vit.maps import attention_maps
from hf_attn.analysis.vit.pruning import head_outcomes
from hf_attn.analysis.vit.restart import BatchRestart

from .models import MODELS, PREFIX, build, implementations, timm_vit, vit


def assert_same(outcome, expected):
    # A restart multiplies heads separately and adds them in another order than the model: float32 rounding of a few layers.
    torch.testing.assert_close(outcome.representation, expected.representation, rtol=1e-4, atol=1e-5)
    if expected.logits is not None:
        torch.testing.assert_close(outcome.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_restarts_hooks_and_masks_agree(name):
    model, images = build(name)
    for implementation in implementations(model):
        if implementation:
            model.set_attn_implementation(implementation)
        layout = ViTLayout.of(model)
        grid = layout.grid_of(images)
        assert grid.num_prefix_tokens == PREFIX[name] + (name == "deit")
        run = partial(layout.run, images, grid.num_prefix_tokens > 0)
        before = run()
        full, pruned = head_outcomes(layout, images)
        assert_same(full, before)
        for layer in (0, 2):
            with without_heads(model, {layer: [1]}):
                gated = run()
            assert not torch.allclose(gated.representation, before.representation, atol=1e-3)
            at_restart = type(gated)(
                None if pruned.logits is None else pruned.logits[layer, 1], pruned.representation[layer, 1]
            )
            assert_same(at_restart, gated)
            with without_attention(model, layer, 1, partial_mask("head", grid)):
                assert_same(run(), gated)
        # The model is unchanged.
        assert_same(run(), before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        if implementation:
            assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["vit", "clip", "deit", "timm", "timm_registers"])
@torch.no_grad()
def test_the_last_layer_works_on_prefix_tokens_where_they_decide(name):
    model, images = build(name)
    layout = ViTLayout.of(model)
    grid = layout.grid_of(images)
    assert BatchRestart(layout, images, grid).trim == grid.num_prefix_tokens


@pytest.mark.parametrize("name", ["dinov2", "timm_average", "beit", "siglip"])
@torch.no_grad()
def test_the_last_layer_works_on_all_tokens_where_patches_are_pooled(name):
    model, images = build(name)
    layout = ViTLayout.of(model)
    assert BatchRestart(layout, images, layout.grid_of(images)).trim == 0


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2_with_registers", "timm"])
@torch.no_grad()
def test_cutting_and_zeroing_equal_gating(name):
    model, images = build(name)
    heads = {0: [0, 2], 2: [1]}
    layout = ViTLayout.of(model)
    with without_heads(model, heads):
        gated = layout.run(images)
    zero_heads(model, heads)
    assert_same(layout.run(images), gated)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut_heads(model, heads)
    assert_same(layout.run(images), gated)
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters


@torch.no_grad()
def test_zeroed_heads_survive_saving_and_can_be_cut_afterwards(tmp_path):
    model, images = build("vit")
    zero_heads(model, {0: [1]})
    zero_heads(model, {0: [2], 1: [0]})
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert zeroed_heads(loaded) == {0: [1, 2], 1: [0]}
    cut_heads(loaded)
    # Without the removed heads, matrix products have another size and different rounding.
    torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Save a model with zero_heads"):
        loaded.save_pretrained(tmp_path / "cut")


@torch.no_grad()
def test_hooks_go_after_an_exception():
    model, images = build("vit")
    before = model(images).logits
    for context in (
        without_heads(model, {0: [0]}),
        without_attention(model, 0, 0, torch.zeros(25, 25)),
    ):
        with pytest.raises(RuntimeError, match="interrupted"), context:
            model(images)
            raise RuntimeError("interrupted")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("_hf_attn_tap" in vars(module) or "forward" in vars(module) for module in model.modules())
    assert torch.equal(model(images).logits, before)


@torch.no_grad()
def test_a_failing_run_restores_the_layers():
    model, images = build("vit")
    layout = ViTLayout.of(model)
    batch = BatchRestart(layout, images, layout.grid_of(images))
    layer = next(batch.layers())
    with pytest.raises(RuntimeError):
        batch.run_from(1, layer.hidden_states, layer.heads[..., :5])
    assert not any("forward" in vars(module) for module in model.modules())


def test_parts_multiply_to_the_whole():
    model, images = build("vit")
    grid = ViTLayout.of(model).grid_of(images)
    parts = [partial_mask(kind, grid) for kind in ("cls_to_patch", "patch_to_cls", "cls_to_cls", "patch_to_patch")]
    assert torch.equal(torch.stack(parts).prod(0), partial_mask("head", grid))
    rings = [partial_mask(f"ring_{hop}", grid) for hop in range(grid.num_hops)]
    assert torch.equal(torch.stack(rings).prod(0), partial_mask("patch_to_patch", grid))
    assert torch.equal(partial_mask("ring_1_2", grid), rings[1] * rings[2])


@torch.no_grad()
def test_rows_are_renormalised_only_on_request():
    model, images = build("vit")
    layout = ViTLayout.of(model)
    mask = partial_mask("patch_to_cls", layout.grid_of(images))
    plain = attention_maps(layout, images)[0, 1] * mask
    sums = []
    for renormalize in (False, True):
        seen = []
        with without_attention(layout, 0, 1, mask, renormalize):
            handle = layout.attentions[0].register_forward_hook(
                lambda m, a, output, seen=seen: seen.append(output[1][:, 1])
            )
            layout.run(images)
            handle.remove()
        sums.append(seen[0])
    torch.testing.assert_close(sums[0], plain)
    torch.testing.assert_close(sums[1].sum(-1), torch.ones(3, 25))


def test_unsupported_models_are_refused_by_what_is_supported():
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16, patch_size=4, window_size=2))
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    for model in (swin, resnet):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} .*Supported: ViT, DeiT, DINOv2"):
            ViTLayout.of(model)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}))
    with pytest.raises(ValueError, match="vision_model"):
        ViTLayout.of(clip)
    assert ViTLayout.of(clip.vision_model).num_heads == 2


def test_bad_arguments_are_named():
    model = vit()
    with (
        pytest.raises(ValueError, match="Head 3 is out of range: a layer has 3 heads"),
        without_heads(model, {0: [3]}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="Layer 7 is out of range: the model has 3 layers"),
        without_heads(model, {7: [0]}),
    ):
        pass
    for heads in ([1], {0: 1}):
        with pytest.raises(ValueError, match="dictionary from layers to lists of heads"), without_heads(model, heads):
            pass
    with (
        pytest.raises(ValueError, match=r"mask must have the shape \(25, 25\).*got \(3, 3\)"),
        without_attention(model, 0, 0, torch.ones(3, 3)),
    ):
        model(pixel_values=torch.zeros(1, 3, 24, 16))
    layout = ViTLayout.of(model)
    with pytest.raises(ValueError, match=r"Images are 16 x 16 pixels.*24 x 16"):
        layout.grid_of(torch.zeros(1, 3, 16, 16))
    grid = layout.grid_of(torch.zeros(1, 3, 24, 16))
    for kind, message in (
        ("nose", "no part of attention called 'nose'"),
        ("ring_6", "hops of a 6 x 4 grid are 0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            partial_mask(kind, grid)
    with pytest.raises(ValueError, match="Layer 0 would have no head left"):
        cut_heads(model, {0: [0, 1, 2]})
    folded, _ = build("sigma_reparam")
    with pytest.raises(ValueError, match="SigmaReparamLinear, whose weight is computed"):
        zero_heads(folded, {0: [0]})


def test_timm_keeps_its_fused_attention():
    model = timm_vit()
    fused = [block.attn.fused_attn for block in model.blocks]
    attention_maps(ViTLayout.of(model), torch.zeros(1, 3, 24, 16))
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert model.training
