"""CLEAR with features of diffusers and accelerate that move weights, replace processors or average parameters."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ChromaTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.training_utils import EMAModel
from torch import nn

from hf_attn.attention.clear import clear_attention
from hf_attn.patching.clear import apply_clear, clear_processors, remove_clear
from hf_attn.patching.clear.distillation import image_ids
from hf_attn.patching.clear.weights import clear_weights_loaded, load_clear_weights, save_clear_weights

from .test_clear import flux_inputs, redraw, run, sd3_inputs, tiny_flux, tiny_sd3


MODELS = {"flux": (tiny_flux, flux_inputs), "sd3": (tiny_sd3, sd3_inputs)}
CPU = torch.device("cpu")


def sequential(model: nn.Module) -> nn.Module:
    """The same offloading as `enable_sequential_cpu_offload()`."""
    return cpu_offload(model, execution_device=CPU)


def leaves(model: nn.Module) -> nn.Module:
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    return model


def pooled_with_weights(kind: str) -> nn.Module:
    model = MODELS[kind][0]()
    apply_clear(model, 2, 2)
    torch.manual_seed(3)
    with torch.no_grad():
        for processor in clear_processors(model).values():
            processor.spatial_weight.normal_()
    return model


# --- offloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [sequential, leaves])
@pytest.mark.parametrize("kind", MODELS)
def test_pooled_keys_under_offloading(kind, offload):
    model, inputs = pooled_with_weights(kind), MODELS[kind][1](8, 12)
    expected = run(model, inputs)
    torch.testing.assert_close(run(offload(model), inputs), expected)
    # A second call finds the weights again.
    torch.testing.assert_close(run(model, inputs), expected)


@pytest.mark.parametrize("offload", [sequential, leaves])
def test_applied_after_offloading(offload):
    inputs = flux_inputs(8, 12)
    model = tiny_flux()
    apply_clear(model, 2, 2)
    expected = run(model, inputs)
    offloaded = offload(tiny_flux())
    apply_clear(offloaded, 2, 2)
    torch.testing.assert_close(run(offloaded, inputs), expected)


@pytest.mark.parametrize("down_factor", [1, 2])
def test_weights_of_an_offloaded_transformer_are_out_of_reach(tmp_path, down_factor):
    model = tiny_flux()
    apply_clear(model, 2, down_factor)
    path = save_clear_weights(model, tmp_path / "weights")
    offloaded = sequential(tiny_flux())
    for use in (
        lambda: load_clear_weights(offloaded, path),
        lambda: clear_weights_loaded(offloaded, path).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"to_q.weight is offloaded.*before offloading is enabled"):
            use()
        assert not clear_processors(offloaded)
    apply_clear(offloaded, 2, down_factor)
    with pytest.raises(ValueError, match=r"to_q.weight is offloaded"):
        save_clear_weights(offloaded, tmp_path / "other")
    assert not (tmp_path / "other" / "clear.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_of_a_quantised_transformer_are_out_of_reach(tmp_path, dtype):
    model = tiny_flux()
    apply_clear(model, 2)
    path = save_clear_weights(model, tmp_path / "weights")
    quantised = tiny_flux()
    projection = quantised.transformer_blocks[0].attn.to_q
    projection.weight = nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"attn.to_q.weight is quantised \(Parameter, torch\..*quantise it afterwards"
    ):
        load_clear_weights(quantised, path)
    assert not clear_processors(quantised)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "tiles", "dense", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_autocast(kind, backend):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs(23, 24, text_length=300)  # enough tokens for "auto" to choose tiles
    apply_clear(model, 3, attn_implementation=backend)
    expected = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, inputs)
    assert (output.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (3,)])
def test_spatial_weight_of_no_cell(shape):
    states = torch.randn(1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"spatial_weight has shape .* d at least 2\. Pass None"):
        clear_attention(states, states, states, grid=(4, 4), radius=2, spatial_weight=torch.ones(shape))


# --- patterns, guidance, averages ------------------------------------------------------------------------------------


def test_a_text_is_one_pattern():
    model = tiny_flux()
    assert apply_clear(model, 8, include="transformer_blocks.0.*").changed == ("transformer_blocks.0.attn",)
    remove_clear(model)
    assert "transformer_blocks.0.attn" not in apply_clear(model, 8, exclude="transformer_blocks.0.*").changed


def test_perturbed_attention_guidance_gets_its_layers():
    class Pipeline(PAGMixin):
        def __init__(self, transformer):
            self.transformer = transformer
            processors = (PAGJointAttnProcessor2_0(), PAGJointAttnProcessor2_0())
            self.set_pag_applied_layers(["transformer_blocks.0.attn$"], processors)

    model = tiny_sd3()
    pipe = Pipeline(model)
    apply_clear(model, 2)
    with pytest.raises(ValueError, match=r"exclude=\['transformer_blocks.0.attn'\]"):
        pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=False)
    remove_clear(model)
    apply_clear(model, 2, exclude="transformer_blocks.0.attn")
    before = model.attn_processors
    number = len(before)
    pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=False)
    assert run(model, sd3_inputs(batch=4)).isfinite().all()
    model.set_attn_processor(dict(before))
    assert len(clear_processors(model)) == number - 1


def test_averages_of_parameters(tmp_path):
    plain, pooled = tiny_flux(), tiny_flux()
    apply_clear(plain, 2)
    apply_clear(pooled, 2, 2)
    for model, is_saved in ((plain, True), (pooled, False)):
        average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
        if is_saved:
            average.save_pretrained(tmp_path)
            loaded = EMAModel.from_pretrained(tmp_path, type(model))
            for tensor, other in zip(loaded.shadow_params, average.shadow_params, strict=True):
                assert torch.equal(tensor, other)
        else:
            with pytest.raises(ValueError, match=r"does not include CLEAR's spatial weights.*save_clear_weights"):
                average.save_pretrained(tmp_path)


# --- Chroma ----------------------------------------------------------------------------------------------------------


def tiny_chroma() -> ChromaTransformer2DModel:
    return redraw(
        ChromaTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )


def chroma_inputs(height: int = 6, width: int = 8, text_length: int = 5) -> dict:
    inputs = flux_inputs(height, width, text_length)
    del inputs["pooled_projections"]
    assert torch.equal(inputs["img_ids"], image_ids(height, width))
    return inputs


@pytest.mark.parametrize("mask_type", [None, torch.bool, torch.float32])
def test_chroma(mask_type):
    model, inputs = tiny_chroma(), chroma_inputs()
    if mask_type is not None:
        mask = torch.ones(2, 5 + 48, dtype=torch.bool)
        mask[1, 3:5] = False
        inputs["attention_mask"] = mask
    full = run(model, inputs)
    if mask_type is not None:
        inputs["attention_mask"] = mask.to(mask_type)
    assert len(apply_clear(model, 99).changed) == 4
    torch.testing.assert_close(run(model, inputs), full, atol=1e-5, rtol=1e-4)
    # A radius smaller than the image changes the output, and so do pooled keys.
    apply_clear(model, 2)
    local = run(model, inputs)
    apply_clear(model, 2, 2)
    assert (local - full).abs().max() > 1e-3 and (run(model, inputs) - local).abs().max() > 1e-3
    assert len(remove_clear(model)) == 4


def test_chroma_with_full_attention_in_some_layers():
    model, inputs = tiny_chroma(), chroma_inputs()
    inputs["attention_mask"] = torch.ones(2, 5 + 48, dtype=torch.bool)
    inputs["attention_mask"][1, 3:5] = False
    full = run(model, inputs)
    apply_clear(model, 99, exclude="transformer_blocks.*")
    torch.testing.assert_close(run(model, inputs), full, atol=1e-5, rtol=1e-4)


def test_chroma_refuses():
    model, inputs = tiny_chroma(), chroma_inputs()
    apply_clear(model, 2)
    with pytest.raises(ValueError, match="of zeros and ones"):
        run(model, {**inputs, "attention_mask": torch.full((2, 53), 0.5)})


@pytest.mark.parametrize("full_attention_in", [(), "single_transformer_blocks.1.*"])
def test_gradient_checkpointing_of_chroma_gives_the_same_gradients(full_attention_in):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = tiny_chroma().train(), chroma_inputs()
        inputs["attention_mask"] = torch.ones(2, 5 + 48, dtype=torch.bool)
        inputs["attention_mask"][1, 3:5] = False
        apply_clear(model, 2, 2, exclude=full_attention_in)
        if checkpointing:
            model.enable_gradient_checkpointing()
        checkpoint = model._gradient_checkpointing_func
        first = model(**inputs).sample
        run(model, chroma_inputs(4, 4))  # another grid before the blocks are computed again
        first.square().mean().backward()
        assert model._gradient_checkpointing_func is checkpoint
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_weights_of_chroma(tmp_path):
    model, inputs = tiny_chroma(), chroma_inputs()
    apply_clear(model, 2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.add_(1)
    load_clear_weights(other, save_clear_weights(model, tmp_path))
    torch.testing.assert_close(run(other, inputs), run(model, inputs))
