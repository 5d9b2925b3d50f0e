"""Activator: properties from the paper and its code, and bad input."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_attn.modeling.activator.configuration_activator import ActivatorConfig
from hf_attn.modeling.activator.modeling_activator import ActivatorForImageClassification, ActivatorModel
from tests.batteries.imaging import ImageFamilyTests


tiny_config = partial(ActivatorConfig.from_variant, "tiny")


def number_of_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestActivator(ImageFamilyTests):
    parameters = {"activator_cifar10": 2_650_890, "activator_geglu_only_cifar10": 1_599_242}
    processors = dict.fromkeys(parameters, (None, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))

    def get_config(self, **overrides):
        return tiny_config(**overrides)

    def test_sdpa_agrees_with_eager(self):
        with pytest.raises(ValueError, match="does not support"):
            self.get_model().set_attn_implementation("sdpa")


class TestActivatorGegluOnly(TestActivator):
    def get_config(self, **overrides):
        return tiny_config(use_mlp=False, **overrides)


@pytest.mark.parametrize(
    ("variant", "parameters", "million_macs"),
    [
        ("activator_cifar10", 658_944, [168.6, 674.2, 2696.9]),
        ("activator_geglu_only_cifar10", 396_032, [101.5]),
    ],
)
def test_cost_of_the_published_models(variant, parameters, million_macs):
    with torch.device("meta"):
        model = ActivatorForImageClassification(ActivatorConfig.from_variant(variant)).eval()
    assert number_of_parameters(model.activator.layers[0]) == parameters
    assert number_of_parameters(model.activator.layers[0].gating_unit) == 395_520
    for size, expected in zip((32, 64, 128), million_macs, strict=False):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size, device="meta"))
        assert round(counter.get_total_flops() / 2e6, 1) == expected


@pytest.mark.parametrize("use_mlp", [True, False])
def test_order_of_patches_has_no_influence(use_mlp):
    model = ActivatorForImageClassification(tiny_config(use_mlp=use_mlp)).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    patches = torch.nn.functional.unfold(pixel_values, 4, stride=4)
    shuffled = torch.nn.functional.fold(patches[..., torch.randperm(16)], (16, 16), 4, stride=4)
    with torch.no_grad():
        torch.testing.assert_close(model(shuffled).logits, model(pixel_values).logits, rtol=0, atol=1e-6)


def test_any_multiple_of_the_patch_size():
    model = ActivatorForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        twice = model(pixel_values.repeat(1, 1, 1, 2)).logits
        torch.testing.assert_close(twice, model(pixel_values).logits, rtol=0, atol=1e-6)
        assert model.activator(torch.randn(1, 3, 64, 20)).last_hidden_state.shape == (1, 80, 24)


def test_one_norm_serves_both_halves():
    layer = ActivatorModel(tiny_config()).layers[0]
    norms = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms == ["norm", "gating_unit.norm"]


def test_gates_are_those_of_the_blocks():
    model = ActivatorForImageClassification(tiny_config()).eval()
    output = model(torch.randn(2, 3, 16, 16), output_gates=True, output_hidden_states=True)
    assert len(output.gates) == 2 and output.gates[1].shape == (2, 16, 40)
    layer = model.activator.layers[1]
    torch.testing.assert_close(output.gates[1], layer.gating_unit(layer.norm(output.hidden_states[1]))[1])


def test_activation_is_a_choice():
    pixel_values = torch.randn(1, 3, 16, 16)
    logits = []
    for hidden_act in ("gelu", "silu", "relu"):
        torch.manual_seed(0)
        logits.append(ActivatorForImageClassification(tiny_config(hidden_act=hidden_act)).eval()(pixel_values).logits)
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


def test_dropout_is_inert_without_the_mlp():
    model = ActivatorForImageClassification(tiny_config(use_mlp=False, hidden_dropout_prob=0.5)).train()
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(pixel_values).logits, model.eval()(pixel_values).logits)


class TestBadInput:
    def test_image_that_patches_do_not_fill(self):
        with pytest.raises(ValueError, match=r"18x16.*multiples of 4"):
            ActivatorForImageClassification(tiny_config())(torch.randn(1, 3, 18, 16))

    def test_attention_maps(self):
        with pytest.raises(ValueError, match="output_gates"):
            ActivatorForImageClassification(tiny_config())(torch.randn(1, 3, 16, 16), output_attentions=True)
