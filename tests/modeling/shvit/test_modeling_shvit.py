"""SHViT: properties from the paper, the fused form, and the tests of every image family."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from hf_attn.architectures.imaging import IMAGENET_MEAN, IMAGENET_STD
from hf_attn.modeling.shvit.configuration_shvit import SHViTConfig
from hf_attn.modeling.shvit.modeling_shvit import SHViTAttention, SHViTForImageClassification, SHViTLayer, SHViTModel
from tests.batteries.imaging import ImageBackboneTests, ImageFamilyTests, randomize


tiny_config = partial(SHViTConfig.from_variant, "tiny")


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class TestSHViT(ImageFamilyTests, ImageBackboneTests):
    parameters = {
        "shvit_s1": 6_330_808,
        "shvit_s2": 11_483_072,
        "shvit_s3": 14_245_273,
        "shvit_s4": 16_588_484,
    }
    processors = {
        **dict.fromkeys(("shvit_s1", "shvit_s2", "shvit_s3"), (256, 224, IMAGENET_MEAN, IMAGENET_STD)),
        "shvit_s4": (292, 256, IMAGENET_MEAN, IMAGENET_STD),
    }
    strides = {"stem": 16, "stage1": 16, "stage2": 32, "stage3": 64}
    auxiliary_channels = 24

    def get_config(self, **overrides):
        return tiny_config(**overrides)


@pytest.mark.parametrize(
    ("variant", "parameters", "mega_macs"),
    [
        ("shvit_s1", 6_308_660, {224: 241.32, 256: 298.91, 384: 674.73, 512: 1206.94}),
        ("shvit_s2", 11_453_508, {224: 365.39, 256: 445.42, 384: 1004.7, 512: 1795.49}),
        ("shvit_s3", 14_210_010, {224: 600.57, 256: 752.2, 384: 1695.93, 512: 3027.69}),
        ("shvit_s4", 16_546_248, {224: 783.35, 256: 986.22, 384: 2224.38, 512: 3971.95}),
    ],
)
def test_cost_of_the_published_variants(variant, parameters, mega_macs):
    with torch.device("meta"):
        model = SHViTForImageClassification(SHViTConfig.from_variant(variant)).eval()
        model.set_attn_implementation("eager")
        for size, expected in mega_macs.items():
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, size, size))
            assert counter.get_total_flops() / 2e6 == pytest.approx(expected, abs=0.006)
        assert model.fuse().num_parameters() == parameters


def test_distillation_head_of_s4():
    with torch.device("meta"):
        model = SHViTForImageClassification(SHViTConfig.from_variant("shvit_s4", distillation=True))
    assert model.num_parameters() == 17_038_380


def test_distillation_averages_in_evaluation_only():
    model = randomize(SHViTForImageClassification(tiny_config(distillation=True)))
    pixel_values, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 1, 0])
    pooled = model.shvit(pixel_values).pooler_output
    heads = model.classifier(pooled), model.distillation_classifier(pooled)
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.class_logits, heads[0])
    torch.testing.assert_close(outputs.distillation_logits, heads[1])
    torch.testing.assert_close(outputs.logits, (heads[0] + heads[1]) / 2)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))

    outputs = model.train()(pixel_values, labels=labels)
    losses = [nn.functional.cross_entropy(x, labels) for x in (outputs.logits, outputs.distillation_logits)]
    torch.testing.assert_close(outputs.loss, (losses[0] + losses[1]) / 2)


def test_blocks_start_as_identity():
    model = SHViTForImageClassification(tiny_config()).eval()
    layers = [module for module in model.modules() if isinstance(module, SHViTLayer)]
    assert len(layers) == 4
    for layer in layers:
        hidden_states = torch.randn(2, layer.mlp.fc2.conv.out_channels, 5, 6)
        assert torch.equal(layer(hidden_states), hidden_states)


def test_attention_is_equivariant_to_permutations():
    model = randomize(SHViTForImageClassification(tiny_config()))
    attention = next(module for module in model.modules() if isinstance(module, SHViTAttention))
    hidden_states = torch.randn(2, 24, 4, 5)
    order = torch.randperm(20)
    expected = attention(hidden_states)[0].flatten(2)[:, :, order]
    permuted = hidden_states.flatten(2)[:, :, order].view_as(hidden_states)
    torch.testing.assert_close(attention(permuted)[0].flatten(2), expected, rtol=1e-5, atol=1e-5)


def test_recorded_outputs():
    model = randomize(SHViTForImageClassification(tiny_config()))
    model.set_attn_implementation("eager")
    outputs = model(torch.randn(2, 3, 96, 130), output_hidden_states=True, output_attentions=True)
    # 96 x 130 -> 6 x 9 -> 3 x 5 -> 2 x 3
    assert [tuple(h.shape) for h in outputs.hidden_states] == [
        (2, 16, 6, 9),
        (2, 16, 6, 9),
        (2, 24, 3, 5),
        (2, 32, 2, 3),
    ]
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 1, 15, 15), (2, 1, 6, 6), (2, 1, 6, 6)]
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("variant", SHViTConfig.variants)
def test_fused_is_the_same_function(variant):
    model = randomize(SHViTForImageClassification(SHViTConfig.from_variant(variant)))
    pixel_values = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(pixel_values).logits
        assert model.fuse() is model
        logits = model(pixel_values).logits
    assert not any(isinstance(module, NORMS) for module in model.modules())
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fused_saves_and_loads(tmp_path):
    model, pixel_values = (
        randomize(SHViTForImageClassification(tiny_config(distillation=True))),
        torch.randn(2, 3, 64, 64),
    )
    expected = model.fuse()(pixel_values).logits
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.fused and not any(isinstance(module, NORMS) for module in again.modules())
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(again(pixel_values).logits, expected)
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    assert {name: tensor.stride() for name, tensor in again.state_dict().items()} == strides
    torch.testing.assert_close(again.fuse()(pixel_values).logits, expected)


def test_fused_backbone():
    from transformers import AutoBackbone

    backbone = randomize(AutoBackbone.from_config(tiny_config(out_features=["stem", "stage2"])))
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = backbone(pixel_values).feature_maps
    torch.testing.assert_close(backbone.fuse()(pixel_values).feature_maps, expected, rtol=1e-4, atol=1e-4)


def test_fusing_is_for_inference():
    model = SHViTForImageClassification(tiny_config()).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.fuse()
    model.eval().fuse()
    with pytest.raises(ValueError, match="inference only"):
        model.train()
    assert not SHViTForImageClassification(tiny_config(fused=True)).training


def test_a_part_of_a_model_is_not_fused_alone(tmp_path):
    model = randomize(SHViTForImageClassification(tiny_config()))
    for part in (model.shvit, model.shvit.encoder):
        with pytest.raises(ValueError, match=r"part of a SHViT(ForImageClassification|Model): fuse the whole model"):
            part.fuse()
    assert not model.config.fused
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model.shvit(pixel_values).pooler_output
    alone = SHViTModel.from_pretrained(tmp_path).fuse()
    torch.testing.assert_close(alone(pixel_values).pooler_output, expected, rtol=1e-4, atol=1e-4)


def test_a_fused_model_takes_no_adapters():
    peft = pytest.importorskip("peft")
    model = randomize(SHViTForImageClassification(tiny_config())).fuse()
    message = r"does not support adapters.*before `fuse\(\)`"
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, peft.LoraConfig(r=2, inference_mode=True))
    config = peft.LoraConfig(r=2, target_modules=["embeddings.layers.0.conv"], inference_mode=True)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match=message):
        adapted(torch.randn(1, 3, 64, 64))


def test_adapters_are_merged_before_fusing():
    peft = pytest.importorskip("peft")
    model = randomize(SHViTForImageClassification(tiny_config()))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2)).eval()
    with pytest.raises(ValueError, match="adapters"):
        adapted.base_model.model.fuse()
    assert adapted.merge_and_unload().fuse().config.fused


def test_onnx_export(tmp_path):
    import onnxruntime

    model = randomize(SHViTForImageClassification(tiny_config())).fuse()
    batch, height, width = (torch.export.Dim.DYNAMIC for _ in range(3))
    torch.onnx.export(
        model,
        (),
        tmp_path / "shvit.onnx",
        kwargs={"pixel_values": torch.randn(2, 3, 128, 192)},
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: batch, 2: height, 3: width}},
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(tmp_path / "shvit.onnx", providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(3, 3, 96, 160)
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pixel_values).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 1]}, "one entry for each stage"),
        ({"hidden_sizes": [12, 24, 32]}, "multiple of 8"),
        ({"partial_dims": [4, 24, 8]}, r"partial_dims\[1\] must be between 1 and .* 23, got 24"),
        ({"block_types": ["i", "s", "x"]}, "block_types"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields, out_features=None)
