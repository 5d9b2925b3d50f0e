"""NiNformer: properties from the paper and its code, and bad input."""

from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_attn import from_official
from hf_attn.architectures.imaging import image_processor_for
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.ninformer.configuration_ninformer import NiNformerConfig
from hf_attn.modeling.ninformer.modeling_ninformer import NiNformerForImageClassification, NiNformerModel
from tests.batteries.imaging import ImageFamilyTests


tiny_config = partial(NiNformerConfig.from_variant, "tiny")


def number_of_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs(config: NiNformerConfig) -> int:
    with torch.device("meta"):
        model = NiNformerForImageClassification(config).eval()
        pixel_values = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values)
    return counter.get_total_flops() // 2


class TestNiNformer(ImageFamilyTests):
    parameters = {"ninformer_cifar10": 2_652_170}
    processors = {"ninformer_cifar10": (None, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

    def get_config(self, **overrides):
        return tiny_config(**overrides)

    def test_sdpa_agrees_with_eager(self):
        with pytest.raises(ValueError, match="does not support"):
            self.get_model().set_attn_implementation("sdpa")


def test_parameters_of_a_block():
    layer = NiNformerModel(NiNformerConfig.from_variant("ninformer_cifar10")).layers[0]
    assert number_of_parameters(layer) == 659_264
    assert number_of_parameters(layer.gating_unit.mixer) == 330_048


def test_macs_are_linear_in_the_number_of_tokens():
    counts = [macs(NiNformerConfig.from_variant("ninformer_cifar10", image_size=size)) for size in (32, 64, 128)]
    assert [round(count / 1e6, 1) for count in counts] == [218.9, 875.6, 3502.2]


def test_weights_start_as_in_pytorch():
    torch.manual_seed(0)
    layer = NiNformerModel(NiNformerConfig(num_hidden_layers=1)).layers[0]
    for linear in (layer.mlp.fc1, layer.gating_unit.mixer.token_mlp.fc1):
        bound = linear.in_features**-0.5
        for tensor in (linear.weight.detach(), linear.bias.detach()):
            assert 0.9 * bound < tensor.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_one_norm_serves_both_branches():
    model = NiNformerForImageClassification(tiny_config())
    norms = [
        name for name, module in model.ninformer.layers[0].named_modules() if isinstance(module, torch.nn.LayerNorm)
    ]
    assert norms == ["norm", "gating_unit.mixer.token_norm", "gating_unit.mixer.channel_norm"]


def test_block_is_the_identity_without_gate_and_feed_forward():
    layer = NiNformerModel(tiny_config()).eval().layers[0]
    with torch.no_grad():
        for linear in (layer.gating_unit.proj, layer.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    hidden_states = torch.randn(2, 16, 24)
    assert torch.equal(layer(hidden_states), hidden_states)


def test_order_of_patches_matters():
    model = NiNformerForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(1, 3, 16, 16)
    patches = pixel_values.unflatten(2, (4, 4)).unflatten(4, (4, 4))
    shuffled = patches.flip(2).flatten(4).flatten(2, 3)
    with torch.no_grad():
        difference = model(pixel_values).logits - model(shuffled).logits
    assert difference.abs().max() > 1e-3


def test_images_of_a_batch_do_not_meet():
    model = NiNformerForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        alone = torch.cat([model(image[None]).logits for image in pixel_values])
        torch.testing.assert_close(model(pixel_values).logits, alone)


def test_gates_are_those_of_the_blocks():
    model = NiNformerForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    output = model(pixel_values, output_gates=True, output_hidden_states=True)
    assert len(output.gates) == 2 and output.gates[0].shape == (2, 16, 24)
    layer = model.ninformer.layers[0]
    normalised = layer.norm(output.hidden_states[0])
    torch.testing.assert_close(output.gates[0], layer.gating_unit.mixer(normalised))
    assert model(pixel_values).gates is None


def test_mean_of_the_tokens_is_classified():
    model = NiNformerForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    output = model.ninformer(pixel_values)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))
    torch.testing.assert_close(model(pixel_values).logits, model.classifier(output.pooler_output))


def test_gray_images():
    model = NiNformerForImageClassification(tiny_config(image_size=28, num_channels=1, num_labels=3))
    assert model.config.num_tokens == 49 and model.config.channel_statistics() == ([0.5], [0.5])
    image = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    pixel_values = image_processor_for(model.config)(Image.fromarray(image), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 1, 28, 28)
    assert model(torch.randn(2, 1, 28, 28), labels=torch.tensor([0, 2])).loss.isfinite()


class TestBadInput:
    def test_other_image_size(self):
        with pytest.raises(ValueError, match=r"16x16 pixels, got 64x16.*[Rr]esize"):
            NiNformerForImageClassification(tiny_config())(torch.randn(1, 3, 64, 16))

    def test_image_size_that_patches_do_not_fill(self):
        with pytest.raises(StrictDataclassError, match="multiple of patch_size, got 30 and 4"):
            tiny_config(image_size=30)

    def test_attention_maps(self):
        with pytest.raises(ValueError, match="output_gates"):
            NiNformerForImageClassification(tiny_config())(torch.randn(1, 3, 16, 16), output_attentions=True)

    def test_sequence_length_of_another_image(self):
        config = {
            "image_size": 16,
            "patch_size": 4,
            "in_channels": 3,
            "num_classes": 3,
            "dropout": 0.0,
            "d_model": 24,
            "d_ffn": 40,
            "num_layers": 2,
            "seq_len": 64,
        }
        with pytest.raises(ConversionError, match=r"seq_len=64.*16 tokens"):
            from_official("ninformer", {"patcher.bias": torch.zeros(24)}, config=config)
