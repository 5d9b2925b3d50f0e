"""TNT: properties from the paper, and the tests of every image family."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_attn.modeling.tnt.configuration_tnt import TNTConfig
from hf_attn.modeling.tnt.modeling_tnt import TNTBackbone, TNTForImageClassification, TNTModel
from tests.batteries.imaging import ImageBackboneTests, ImageFamilyTests, randomize


tiny_config = partial(TNTConfig.from_variant, "tiny")


class TestTNT(ImageFamilyTests, ImageBackboneTests):
    parameters = {"tnt_ti": 6_076_408, "tnt_s": 23_768_584, "tnt_b": 65_428_680, "tnt_s_legacy": 23_755_336}
    processors = dict.fromkeys(parameters, (248, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    strides = {"stem": 8, "stage1": 8, "stage2": 8}
    sizes = ((32, 32), (64, 64), (40, 72))
    auxiliary_channels = 32

    def get_config(self, **overrides):
        return tiny_config(**overrides)


@pytest.mark.parametrize(
    ("variant", "giga_macs"), [("tnt_ti", 1.404), ("tnt_s", 5.217), ("tnt_b", 14.049), ("tnt_s_legacy", 5.217)]
)
def test_cost_of_the_published_variants(variant, giga_macs):
    with torch.device("meta"):
        model = TNTForImageClassification(TNTConfig.from_variant(variant)).eval()
        model.set_attn_implementation("eager")
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.0006)


@pytest.mark.parametrize("fields", [{}, {"legacy": True}, {"squeeze_excitation": True}, {"pooling": "mean"}])
def test_every_design_runs_and_learns(fields):
    model = TNTForImageClassification(tiny_config(drop_path_rate=0.1, hidden_dropout_prob=0.1, **fields)).train()
    model(torch.randn(3, 3, 32, 32), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_words_see_their_own_patch_only():
    model = randomize(TNTModel(tiny_config()))
    pixel_values = torch.randn(1, 3, 32, 32)
    changed = pixel_values.clone()
    changed[:, :, 8:16, 24:32] += 1.0  # row 1, column 3 of a grid of 4 x 4 patches
    words, sentences = [], []
    for index in range(2):
        model.layers[index].register_forward_hook(lambda module, args, output: sentences.append(output[0]))
        model.layers[index].register_forward_hook(lambda module, args, output: words.append(output[1]))
    model(pixel_values)
    model(changed)
    others = torch.arange(16) != 7
    for before, after in zip(words[:2], words[2:], strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[7], after[7])
    assert not any(
        torch.equal(before[:, token], after[:, token])
        for before, after in zip(sentences[:2], sentences[2:], strict=True)
        for token in range(17)
    )


@torch.no_grad()
def test_without_the_words_the_blocks_are_those_of_a_vit():
    model = randomize(TNTModel(tiny_config()))
    for layer in model.layers:
        for tensor in (layer.words_to_sentence.projection.weight, *layer.words_to_sentence.norm2.parameters()):
            tensor.zero_()
    pixel_values = torch.randn(2, 3, 32, 32)
    expected, _ = model.embeddings(pixel_values)
    for layer in model.layers:
        normed = layer.norm1(expected)
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        qkv = [layer.attention.qk_proj.weight, layer.attention.v_proj.weight]
        attention.in_proj_weight.copy_(torch.cat(qkv))
        attention.in_proj_bias.zero_()
        attention.out_proj.load_state_dict(layer.attention.o_proj.state_dict())
        expected = expected + attention(normed, normed, normed)[0]
        hidden = nn.functional.gelu(layer.mlp.fc1(layer.norm2(expected)))
        expected = expected + layer.mlp.fc2(hidden)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, model.layernorm(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_not_overwritten_by_later_blocks():
    model = randomize(TNTModel(tiny_config()))
    pixel_values = torch.randn(2, 3, 32, 32)
    embedded, _ = model.embeddings(pixel_values)
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 3
    assert torch.equal(hidden_states[0], embedded)


def test_images_of_another_size():
    model = randomize(TNTForImageClassification(tiny_config()))
    with pytest.raises(ValueError, match=r"40 x 64.*interpolate_pos_encoding"):
        model(torch.randn(1, 3, 40, 64))
    assert model(torch.randn(1, 3, 40, 64), interpolate_pos_encoding=True).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"multiples of patch_size \(8\), got 40 x 63"):
        model(torch.randn(1, 3, 40, 63), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="multiples of patch_size"):
        TNTBackbone(tiny_config())(torch.randn(1, 3, 36, 32))

    same = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(same, interpolate_pos_encoding=True).logits, model(same).logits)
    rectangular = tiny_config(image_size=[16, 40])
    assert TNTForImageClassification(rectangular)(torch.randn(2, 3, 16, 40)).logits.shape == (2, 2)


@torch.no_grad()
def test_interpolated_positions_of_a_constant_are_constant():
    model = randomize(TNTModel(tiny_config()))
    constant = torch.randn(32)
    model.embeddings.position_embeddings[:, 1:] = constant
    positions = model.embeddings._position_embeddings((3, 7))
    torch.testing.assert_close(positions[0, 1:], constant.expand(21, 32))
    assert torch.equal(positions[:, 0], model.embeddings.position_embeddings[:, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, r"hidden_size \(32\) must be a multiple of num_attention_heads \(5\)"),
        ({"inner_num_attention_heads": 3}, "inner_hidden_size"),
        ({"image_size": 36}, r"image_size \(36\) must be a multiple of patch_size \(8\)"),
        ({"legacy": True, "inner_stride": 3}, "multiple of inner_stride"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


def test_gradient_accumulation_equals_one_big_batch(tmp_path):
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 2} for index in range(8)]

    def trained(batch_size: int, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = TNTForImageClassification(tiny_config())
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        Trainer(model, arguments, train_dataset=data).train()
        return model.state_dict()

    one, several = trained(8, 1), trained(2, 4)
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, msg=name)
