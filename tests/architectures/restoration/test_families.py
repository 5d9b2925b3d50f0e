"""HAT and DRCT as models: published sizes, inputs of any size, losses, implementations, conversion, and bad input."""

import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoModelForImageToImage, Trainer, TrainingArguments

from hf_attn import from_official
from hf_attn.architectures.restoration.layers import pad_to_multiple
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.drct.configuration_drct import DRCTConfig
from hf_attn.modeling.drct.modeling_drct import DRCTForImageSuperResolution
from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATForImageSuperResolution
from tests.architectures.restoration.networks import SMALL_NETWORK, spandrel_network


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHELL = {"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3], "window_size": 4, "upscale": 2}
FAMILIES = {
    "hat": (HATForImageSuperResolution, HATConfig, {**SHELL, "compress_ratio": 3, "squeeze_factor": 4}),
    "drct": (DRCTForImageSuperResolution, DRCTConfig, {**SHELL, "num_heads": [2, 2], "growth_channels": 4}),
}


def make_model(family: str, **overrides):
    torch.manual_seed(0)
    model_class, config_class, fields = FAMILIES[family]
    model = model_class(config_class(**{**fields, **overrides})).eval()
    # Position biases and the channel branch affect the output, unlike in a freshly initialised model.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        *((HATConfig.from_variant(f"hat_s_x{scale}"), n) for scale, n in ((2, 9473471), (3, 9658111), (4, 9621183))),
        *((HATConfig.from_variant(f"hat_x{scale}"), n) for scale, n in ((2, 20624795), (3, 20809435), (4, 20772507))),
        *(
            (HATConfig.from_variant(f"hat_l_x{scale}"), n)
            for scale, n in ((2, 40698863), (3, 40883503), (4, 40846575))
        ),
        *(
            (DRCTConfig.from_variant(f"drct_x{scale}"), n)
            for scale, n in ((2, 13991867), (3, 14176507), (4, 14139579))
        ),
        *(
            (DRCTConfig.from_variant(f"drct_l_x{scale}"), n)
            for scale, n in ((2, 27433007), (3, 27617647), (4, 27580719))
        ),
    ],
)
def test_published_variants_have_their_parameters(config, parameters):
    with torch.device("meta"):
        model = AutoModelForImageToImage.from_config(config)
    assert model.num_parameters() == parameters


def test_parameters_of_the_modules():
    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        group = HATForImageSuperResolution(HATConfig()).hat.groups[0]
        dense_group = DRCTForImageSuperResolution(DRCTConfig()).drct.groups[0]
    assert count(group.blocks[0]) == 463_932
    assert count(group.blocks[0].channel_branch) == 196_986
    assert count(group.overlapping_block) == 270_306
    assert count(group) == 3_345_678
    assert count(dense_group) == 2_240_190
    assert [block.attention.num_heads for block in dense_group.blocks] == [6, 4, 2, 6, 4]
    assert [block.attention.head_dim for block in dense_group.blocks] == [30, 53, 122, 46, 77]
    assert [block.mlp.fc1.out_features for block in dense_group.blocks] == [360, 424, 488, 276, 308]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("upscale", [1, 2, 3, 4, 8])
def test_any_size_at_any_scale(family, upscale):
    model = make_model(family, upscale=upscale)
    for height, width in ((1, 1), (3, 7), (8, 4), (9, 13)):
        with torch.no_grad():
            reconstruction = model(torch.rand(2, 3, height, width)).reconstruction
        assert reconstruction.shape == (2, 3, upscale * height, upscale * width)
        assert reconstruction.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_do_not_touch_each_other(family):
    model = make_model(family)
    images = torch.rand(3, 3, 9, 12)
    with torch.no_grad():
        together = model(images).reconstruction
        alone = torch.cat([model(image[None]).reconstruction for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_agree_in_outputs_and_gradients(family):
    pixel_values = torch.rand(2, 3, 10, 13)
    results = {}
    for implementation in ("eager", "sdpa"):
        model = make_model(family)
        model.set_attn_implementation(implementation)
        model(pixel_values, labels=torch.zeros(2, 3, 20, 26)).loss.backward()
        results[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
        results[implementation]["reconstruction"] = model(pixel_values).reconstruction.detach()
    for name, expected in results["eager"].items():
        torch.testing.assert_close(results["sdpa"][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_has_no_gradients_on_a_cpu(family):
    model = make_model(family)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"torch\.no_grad.*Use attn_implementation=.sdpa."):
        model(torch.rand(1, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention compiles C++")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_agrees(family, device):
    """With shifted windows, keys beyond the window, and a number of windows that changes from call to call."""
    model = make_model(family).to(device)
    for size in ((10, 13), (8, 8), (21, 5)):
        pixel_values = torch.rand(2, 3, *size, device=device)
        with torch.no_grad():
            model.set_attn_implementation("eager")
            expected = model(pixel_values).reconstruction
            model.set_attn_implementation("flex_attention")
            torch.testing.assert_close(model(pixel_values).reconstruction, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_steps(family, dtype):
    torch.manual_seed(0)
    model_class, config_class, fields = FAMILIES[family]
    model = model_class(config_class(**fields)).eval()
    pixel_values = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values).reconstruction
        reconstruction = model.to(dtype)(pixel_values).reconstruction
    assert reconstruction.dtype == torch.float32
    # The residual that the network adds to the mean has 8 (or 11) bits.
    assert (reconstruction - expected).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions(family):
    model = make_model(family)
    model.set_attn_implementation("eager")
    attentions = model(torch.rand(2, 3, 8, 12), output_attentions=True).attentions
    # Three blocks and an overlapping one in each of the two groups of HAT; five blocks in each of DRCT.
    assert len(attentions) == (5 if family == "hat" else 10)
    for weights in attentions:
        assert weights.shape[0] == 2 * 6
        assert weights.shape[2] == 16
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)
    if family == "hat":
        assert {weights.shape[-1] for weights in attentions} == {16, 36}


def test_without_its_scale_the_channel_branch_does_not_matter():
    model = make_model("hat", conv_scale=0.0)
    pixel_values = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(pixel_values).reconstruction
        for name, parameter in model.named_parameters():
            if "channel_branch" in name:
                parameter.normal_()
        torch.testing.assert_close(model(pixel_values).reconstruction, expected, atol=0, rtol=0)


def test_a_dense_group_without_its_last_convolution_is_the_identity():
    model = make_model("drct")
    group = model.drct.groups[0]
    torch.nn.init.zeros_(group.adjust[-1].weight)
    torch.nn.init.zeros_(group.adjust[-1].bias)
    hidden_states = torch.rand(1, 64, 12)
    torch.testing.assert_close(group(hidden_states, (8, 8)), hidden_states, atol=0, rtol=0)


def test_depths_and_image_size_of_drct_do_not_change_it():
    model = make_model("drct")
    other = DRCTForImageSuperResolution(DRCTConfig(**{**FAMILIES["drct"][2], "depths": [3, 7], "image_size": 32}))
    other.load_state_dict(model.state_dict())
    pixel_values = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            other.eval()(pixel_values).reconstruction, model(pixel_values).reconstruction, atol=0, rtol=0
        )


def test_stochastic_depth_grows_over_the_blocks():
    hat = make_model("hat", depths=[3, 3], num_heads=[2, 2], drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for group in hat.hat.groups for block in group.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    drct = make_model("drct", depths=[3, 3], drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for group in drct.drct.groups for block in group.blocks]
    assert rates == pytest.approx([0] * 5 + [0.3] * 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses(family):
    pixel_values, labels = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 10, 12)
    for loss_type, distance in (("l1", torch.nn.functional.l1_loss), ("l2", torch.nn.functional.mse_loss)):
        model = make_model(family, loss_type=loss_type)
        output = model(pixel_values, labels=labels)
        assert output.loss == distance(output.reconstruction, labels)
    with pytest.raises(ValueError, match=r"labels must have the shape.*\(2, 3, 10, 12\) at upscale 2"):
        model(pixel_values, labels=torch.rand(2, 3, 5, 6))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.high = torch.rand(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.high)

    def __getitem__(self, index):
        return {"pixel_values": torch.nn.functional.avg_pool2d(self.high[index], 2), "labels": self.high[index]}


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_are_those_of_one_batch(family, tmp_path):
    gradients = []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = make_model(family, drop_path_rate=0.0)
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        seen = {}

        class Keeper(Trainer):
            def create_optimizer(self, *args, **kwargs):
                optimizer = super().create_optimizer(*args, **kwargs)
                optimizer.register_step_pre_hook(
                    lambda *_: seen.update({n: p.grad.clone() for n, p in self.model.named_parameters()})  # noqa: B023
                )
                return optimizer

        Keeper(model=model, args=arguments, train_dataset=Pairs(4)).train()
        gradients.append(seen)
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_computes_the_same(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "model")
    pixel_values = torch.rand(1, 3, 7, 9)
    with torch.no_grad():
        torch.save((pixel_values, model(pixel_values).reconstruction), tmp_path / "expected.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    script = f"""
import torch, hf_attn
from transformers import AutoModelForImageToImage
model = AutoModelForImageToImage.from_pretrained(r"{tmp_path / "model"}")
pixel_values, expected = torch.load(r"{tmp_path / "expected.pt"}")
state = torch.load(r"{tmp_path / "state.pt"}")
assert state.keys() == model.state_dict().keys()
assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
with torch.no_grad():
    torch.testing.assert_close(model(pixel_values).reconstruction, expected, atol=1e-6, rtol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lora_finds_its_targets():
    peft = pytest.importorskip("peft")
    for family in FAMILIES:
        adapted = peft.get_peft_model(make_model(family), peft.LoraConfig())
        modules = {name.rsplit(".", 1)[-1] for name in adapted.targeted_module_names}
        assert modules == {"qkv", "proj"}
        adapted(pixel_values=torch.rand(1, 3, 4, 4), labels=torch.rand(1, 3, 8, 8)).loss.backward()


def test_base_model():
    model = make_model("hat")
    features = AutoModel.from_config(model.config)(torch.rand(1, 3, 5, 6)).last_hidden_state
    assert features.shape == (1, 12, 8, 8)


# --- conversion ----------------------------------------------------------------------------------------------------


FULL_SIZE = {
    "hat_s_x4": {
        "embed_dim": 144,
        "depths": [6] * 6,
        "num_heads": [6] * 6,
        "compress_ratio": 24,
        "squeeze_factor": 24,
    },
    "hat_x3": {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6},
    "drct_x4": {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "gc": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL_SIZE)
def test_agrees_with_spandrel_at_full_size(variant):
    """No configuration is given: all of it follows from the shapes."""
    family, upscale = variant.split("_")[0], int(variant[-1])
    network = spandrel_network(family, upscale=upscale, **FULL_SIZE[variant])
    model = from_official(family, network.state_dict())
    assert model.config.to_diff_dict() == FAMILIES[family][1].from_variant(variant).to_diff_dict() | {
        name: value for name, value in model.config.to_diff_dict().items() if name in ("architectures", "dtype")
    }
    pixel_values = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).reconstruction, network(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"resi_connection": "identity"}, {"patch_norm": False, "qkv_bias": False}])
def test_options_are_read_off_the_weights(family, options):
    network = spandrel_network(family, **SMALL_NETWORK[family], **options)
    model = from_official(family, network.state_dict())
    for name, value in options.items():
        assert getattr(model.config, name) == value
    pixel_values = torch.rand(1, 3, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).reconstruction, network(pixel_values), atol=1e-5, rtol=0)


def test_absolute_embeddings_are_read_off_the_weights():
    network = spandrel_network("hat", **SMALL_NETWORK["hat"], ape=True)
    model = from_official("hat", network.state_dict())
    assert (model.config.use_absolute_embeddings, model.config.image_size) == (True, 64)
    with pytest.raises(ValueError, match="absolute position embeddings for inputs of 64x64, but got 80x48"):
        model(torch.rand(1, 3, 70, 40))
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"image_size \(66\) must be a multiple of window_size"
    ):
        type(model.config)(use_absolute_embeddings=True, image_size=66)
    # A smaller image is padded to that size by reflection, and the result is cropped.
    small = torch.rand(1, 3, 30, 40)
    scale = model.config.upscale
    with torch.no_grad():
        expected = model(pad_to_multiple(small, 64)).reconstruction[..., : 30 * scale, : 40 * scale]
        torch.testing.assert_close(model(small).reconstruction, expected)


def test_averaged_weights_come_first(tmp_path):
    network = spandrel_network("hat", **SMALL_NETWORK["hat"])
    raw = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    path = tmp_path / "HAT.pth"
    torch.save({"params": raw, "params_ema": network.state_dict()}, path)
    model = from_official("hat", path)
    torch.testing.assert_close(model.hat.first_convolution.weight, network.conv_first.weight)
    torch.save({"params": network.state_dict()}, path)
    torch.testing.assert_close(from_official("hat", path).hat.first_convolution.weight, network.conv_first.weight)


def test_checkpoints_that_do_not_fit():
    state = spandrel_network("hat", **SMALL_NETWORK["hat"]).state_dict()
    with pytest.raises(ConversionError, match="for scale 4, but upscale=2 was requested"):
        from_official("hat", state, {"upscale": 2})
    with pytest.raises(ConversionError, match=r"keys that hat does not use: extra\.weight"):
        from_official("hat", {**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(ConversionError, match=r"no weights for hat\.layernorm\.weight"):
        from_official("hat", {name: tensor for name, tensor in state.items() if name != "norm.weight"})
    with pytest.raises(ConversionError, match="not a checkpoint of drct: it has no"):
        from_official("drct", state)
    with pytest.raises(ConversionError, match="hat does not have the arguments windowsize"):
        from_official("hat", state, {"windowsize": 16})
    with pytest.raises(ConversionError, match="img_size=16 is not larger than the window of 16"):
        from_official("hat", state, {"img_size": 16})
    with pytest.raises(ConversionError, match="patch_size must be 1"):
        from_official("hat", state, {"patch_size": 2})


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upsampler": "nearest+conv"}, "upsampler='nearest.conv' is not supported"),
        ({"upsampler": ""}, "the only one is 'pixelshuffle'"),
        ({"upscale": 6}, "power of two .* or 3, got 6"),
        ({"num_heads": [5, 3]}, r"embed_dim \(12\) must be a multiple of num_heads, got 5"),
        ({"num_heads": [2]}, "one entry for each residual group"),
        ({"depths": [], "num_heads": []}, "one entry for each residual group"),
        ({"window_size": 7}, "overlap_ratio=0.5 enlarges windows of 7 by 3 pixels, which must be an even number"),
        ({"squeeze_factor": 30}, r"squeeze_factor must be at most embed_dim \(12\), got 30"),
    ],
)
def test_configurations_that_hat_cannot_do(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        HATConfig(**{**FAMILIES["hat"][2], **fields})


def test_heads_of_drct_that_do_not_divide():
    with pytest.raises(StrictDataclassClassValidationError, match=r"num_heads can be \[1, 2, .*\], not 6") as error:
        DRCTConfig(embed_dim=30, growth_channels=4, num_heads=[6], depths=[6])
    works = [int(number) for number in str(error.value).split("can be [")[1].split("]")[0].split(",")]
    for num_heads in works:
        DRCTConfig(embed_dim=30, growth_channels=4, num_heads=[num_heads], depths=[6])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)])
def test_inputs_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="pixel_values"):
        make_model("hat")(torch.rand(shape))


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"no variant 'hat_x5'\. Variants: hat_s_x2"):
        HATConfig.from_variant("hat_x5")
