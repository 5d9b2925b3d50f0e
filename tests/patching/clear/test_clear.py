"""CLEAR on tiny FLUX and SD3 transformers of diffusers: applying, removing, and all kinds of calls."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from hf_attn.attention.clear import clear_mask
from hf_attn.patching.clear import apply_clear, clear_processors, raster_grid, remove_clear
from hf_attn.patching.clear.distillation import image_ids
from hf_attn.patching.clear.high_resolution import ntk_scaled


def redraw(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def tiny_flux():
    return redraw(
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )
    )


def tiny_sd3(qk_norm="rms_norm"):
    return redraw(
        SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=(0, 1),
            qk_norm=qk_norm,
        )
    )


def flux_inputs(height=10, width=7, text_length=5, batch=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, height * width, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_length, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "img_ids": image_ids(height, width),
        "txt_ids": torch.zeros(text_length, 3),
    }


def sd3_inputs(height=6, width=8, text_length=5, batch=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_length, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.linspace(200.0, 800.0, batch),
    }


MODELS = {"flux": (tiny_flux, flux_inputs), "sd3": (tiny_sd3, sd3_inputs)}
both = pytest.mark.parametrize("kind", MODELS)


def run(model, inputs, **attention_kwargs):
    with torch.no_grad():
        return model(**inputs, joint_attention_kwargs=attention_kwargs or None, return_dict=False)[0]


# --- apply and remove ------------------------------------------------------------------------------------------------


@both
def test_every_attention_layer_is_changed_and_restored(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    before, processors = run(model, inputs), dict(model.attn_processors)
    names = tuple(key.removesuffix(".processor") for key in processors)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    report = apply_clear(model, radius=3)
    assert report.changed == names and not report.skipped
    assert tuple(clear_processors(model)) == names
    assert not torch.allclose(run(model, inputs), before, atol=1e-3)

    assert remove_clear(model) == names
    assert all(model.attn_processors[key] is processor for key, processor in processors.items())
    assert torch.equal(run(model, inputs), before)
    assert not model._forward_pre_hooks and not any(module._forward_pre_hooks for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert remove_clear(model) == ()


@both
def test_applying_again_changes_nothing_or_the_settings(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs(height=6, width=8)
    apply_clear(model, radius=2, down_factor=2)
    with torch.no_grad():
        for processor in clear_processors(model).values():
            processor.spatial_weight.normal_()
    once = run(model, inputs)
    report = apply_clear(model, radius=2, down_factor=2)
    assert report.changed == () and set(report.skipped.values()) == {"is already as requested"}
    assert torch.equal(run(model, inputs), once)

    weights = [processor.spatial_weight for processor in clear_processors(model).values()]
    assert len(apply_clear(model, radius=3, down_factor=2).changed) == len(weights)
    assert all(a.spatial_weight is b for a, b in zip(clear_processors(model).values(), weights, strict=True))
    apply_clear(model, radius=3)
    assert not any("spatial_weight" in name for name, _ in model.named_parameters())
    remove_clear(model)
    assert not clear_processors(model)


@both
def test_a_radius_beyond_the_image_is_the_model_as_it_was(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    before = run(model, inputs)
    apply_clear(model, radius=20)
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-4)


def test_flux_is_the_stock_model_with_the_mask():
    model, inputs = tiny_flux(), flux_inputs()
    mask = clear_mask(10, 7, 5, 3)[None, None]
    expected = run(model, inputs, attention_mask=mask)
    apply_clear(model, radius=3)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)


@both
def test_chosen_blocks_only(kind, caplog):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    full = run(model, inputs)
    report = apply_clear(model, radius=2, include=["transformer_blocks.*"], exclude=["*.0.*"])
    assert report.changed and all(name.startswith("transformer_blocks.") for name in report.changed)
    assert set(report.skipped.values()) <= {"not included", "excluded"}
    assert len(report.changed) + len(report.skipped) == len(model.attn_processors)
    some = run(model, inputs)
    assert "are not expected" not in caplog.text
    apply_clear(model, radius=2)
    everywhere = run(model, inputs)
    assert not torch.allclose(some, full, atol=1e-3) and not torch.allclose(some, everywhere, atol=1e-3)


@both
def test_a_copy_is_independent(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    full = run(model, inputs)
    apply_clear(model, radius=2)
    local = run(model, inputs)
    other = copy.deepcopy(model)
    remove_clear(other)
    assert torch.equal(run(other, inputs), full) and torch.equal(run(model, inputs), local)


# --- the grid of each call ---------------------------------------------------------------------------------------------


@both
def test_the_grid_comes_from_each_call(kind):
    make, make_inputs = MODELS[kind]
    model = make()
    apply_clear(model, radius=2)
    shapes = [{"height": 6, "width": 8}, {"height": 8, "width": 6, "text_length": 9}, {"height": 5, "width": 3}]
    first = [run(model, make_inputs(**shape)) for shape in shapes]
    again = [run(model, make_inputs(**shape)) for shape in reversed(shapes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    fresh = make()
    apply_clear(fresh, radius=2)
    assert torch.equal(run(fresh, make_inputs(**shapes[1])), first[1])


@both
def test_rows_of_a_batch_are_independent(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2)
    alone = {name: tensor if name.endswith("_ids") else tensor[:1] for name, tensor in inputs.items()}
    torch.testing.assert_close(run(model, inputs)[:1], run(model, alone), rtol=1e-4, atol=1e-5)


def test_positional_arguments():
    model, inputs = tiny_sd3(), sd3_inputs()
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values()).sample, expected)


def test_a_given_grid_is_used_and_checked():
    model, inputs = tiny_flux(), flux_inputs()
    apply_clear(model, radius=2)
    assert torch.equal(run(model, inputs, clear_grid=(10, 7)), run(model, inputs))
    with pytest.raises(ValueError, match="70 image tokens, but a grid of 9 x 7"):
        run(model, inputs, clear_grid=(9, 7))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (3, 4), (300, 2), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grid_from_position_ids(height, width, dtype):
    assert raster_grid(image_ids(height, width).to(dtype)) == (height, width)
    assert raster_grid(image_ids(height, width).to(dtype)[None]) == (height, width)


def test_token_sets_that_are_no_image_are_refused():
    ids = image_ids(4, 6)
    reference = ids.clone()
    reference[:, 0] = 1
    for other in (torch.cat([ids, reference]), torch.cat([ids, ids]), ids[torch.randperm(24)], ids[:-1]):
        with pytest.raises(ValueError, match="not: for reference images"):
            raster_grid(other)


# --- arguments of a call -----------------------------------------------------------------------------------------------


@both
def test_masked_text_is_as_if_it_were_not_there(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs(text_length=5)
    apply_clear(model, radius=2)
    short = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :3])
    if "txt_ids" in inputs:
        short["txt_ids"] = inputs["txt_ids"][:3]
    expected = run(model, short)
    mask = (torch.arange(5) < 3).expand(2, 5)
    image = torch.ones(2, expected[0].numel() // (8 if kind == "flux" else 16), dtype=torch.bool)
    whole = torch.cat([image, mask] if kind == "sd3" else [mask, image], dim=1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for attention_mask in (mask, mask[:, None, None], whole, additive):
        torch.testing.assert_close(run(model, inputs, attention_mask=attention_mask), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot mask image tokens"):
        run(model, inputs, attention_mask=~whole)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\)"):
        run(model, inputs, attention_mask=mask[:, :4])


@both
def test_proportional_attention_changes_the_result(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2, exclude=["*.1.attn"])
    plain = run(model, inputs)
    assert torch.equal(run(model, inputs, proportional_attention=False), plain)
    assert not torch.allclose(run(model, inputs, proportional_attention=True), plain, atol=1e-3)


def test_ntk_scaling_is_undone():
    model, inputs = tiny_flux(), flux_inputs()
    before = run(model, inputs)
    with ntk_scaled(model, 10):
        assert not torch.allclose(run(model, inputs), before, atol=1e-4)
    assert torch.equal(run(model, inputs), before)
    with pytest.raises(TypeError, match="SD3Transformer2DModel has no rotary"), ntk_scaled(tiny_sd3(), 10):
        pass


@both
@pytest.mark.parametrize("down_factor", [1, 2])
def test_backends_agree_on_outputs_and_gradients(kind, down_factor):
    make, make_inputs = MODELS[kind]
    inputs = make_inputs(height=10, width=12)
    results = {}
    for backend in ("eager", "dense", "tiles"):
        model = make()
        apply_clear(model, radius=3, down_factor=down_factor, attn_implementation=backend)
        output = model(**inputs).sample
        output.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "attn" in name}
        assert down_factor == 1 or sum("spatial_weight" in name for name in gradients) == len(model.attn_processors)
        results[backend] = {"output": output.detach(), **{n: g for n, g in gradients.items() if g is not None}}
    for backend in ("dense", "tiles"):
        assert results[backend].keys() == results["eager"].keys()
        for name, expected in results["eager"].items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(results[backend][name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


@both
def test_the_backend_of_diffusers_counts(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    for name in ("native", "flex"):
        for processor in model.attn_processors.values():
            processor._attention_backend = name
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    for processor in model.attn_processors.values():
        processor._attention_backend = "sage"
    with pytest.raises(ValueError, match="'sage' of diffusers computes full attention"):
        run(model, inputs)


@both
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    make, make_inputs = MODELS[kind]
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        apply_clear(model, radius=2)
        if checkpointing:
            model.enable_gradient_checkpointing()
        first = model(**make_inputs(height=6, width=8)).sample
        run(model, make_inputs(height=4, width=4))  # another grid before the blocks are recomputed
        first.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@both
def test_fused_projections(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    remove_clear(model)
    model.fuse_qkv_projections()
    apply_clear(model, radius=2)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_controlnet_residuals_pass_through():
    model, inputs = tiny_flux(), flux_inputs()
    apply_clear(model, radius=2)
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 70, 32)],
        "controlnet_single_block_samples": [torch.randn(2, 70, 32)],
    }
    assert not torch.allclose(run(model, {**inputs, **residuals}), run(model, inputs), atol=1e-2)
    zeros = {name: [torch.zeros_like(tensor) for tensor in value] for name, value in residuals.items()}
    assert torch.equal(run(model, {**inputs, **zeros}), run(model, inputs))


@both
def test_lora(kind):
    from peft import LoraConfig

    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2, down_factor=1)
    before = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = run(model, inputs, scale=1.0)
    assert not torch.allclose(adapted, before, atol=1e-3)
    torch.testing.assert_close(run(model, inputs, scale=0.0), before, rtol=1e-4, atol=1e-5)
    remove_clear(model)
    apply_clear(model, radius=2)
    assert torch.equal(run(model, inputs, scale=1.0), adapted)


@both
def test_bfloat16(kind):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs()
    apply_clear(model, radius=2, down_factor=1)
    expected = run(model, inputs)
    model.to(torch.bfloat16)
    narrow = {name: tensor if "ids" in name else tensor.bfloat16() for name, tensor in inputs.items()}
    output = run(model, narrow)
    assert output.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(output.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_compiled_blocks(backend):
    model = tiny_flux()
    apply_clear(model, radius=2, attn_implementation=backend)
    inputs = flux_inputs()
    expected = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_whole_graph_with_a_given_grid():
    model, inputs = tiny_flux(), flux_inputs()
    apply_clear(model, radius=2, attn_implementation="tiles")
    expected = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True)
    # The compiler's vectorised exponentials and sines differ by some units in the last place, for outputs up to 25.
    atol = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(run(compiled, inputs, clear_grid=(10, 7)), expected, rtol=0, atol=atol)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0, -3, 2.5, True, "8"])
def test_radii_that_make_no_sense(radius):
    with pytest.raises(ValueError, match="radius must be a positive integer"):
        apply_clear(tiny_flux(), radius=radius)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="down_factor must be a positive integer, in tokens, got 0"):
        apply_clear(tiny_flux(), radius=2, down_factor=0)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        apply_clear(tiny_flux(), radius=2, attn_implementation="cuda")
    with pytest.raises(ValueError, match=r"No attention layer matches .* names like transformer_blocks.0.attn"):
        apply_clear(tiny_flux(), radius=2, include=["blocks.0"])


@both
def test_grids_that_the_cells_do_not_divide(kind):
    make, make_inputs = MODELS[kind]
    model = make()
    apply_clear(model, radius=2, down_factor=4)
    run(model, make_inputs(height=8, width=4))
    with pytest.raises(ValueError, match=r"multiples of down_factor = 4, got 8 x 6. .* multiples of 64 pixels"):
        run(model, make_inputs(height=8, width=6))


def test_other_models_are_refused():
    class Pipeline:
        transformer = tiny_flux()

    with pytest.raises(TypeError, match=r"got a Pipeline. Pass its `transformer`"):
        apply_clear(Pipeline(), radius=2)
    with pytest.raises(
        TypeError,
        match=r"FluxTransformer2DModel, ChromaTransformer2DModel, SD3Transformer2DModel .* got a Linear.$",
    ):
        apply_clear(nn.Linear(2, 2), radius=2)
    with pytest.raises(TypeError, match=r"got a OptimizedModule. Pass its `_orig_mod`"):
        apply_clear(torch.compile(tiny_flux()), radius=2)


def test_foreign_processors_are_not_overwritten():
    class Foreign(JointAttnProcessor2_0):
        pass

    model = tiny_sd3()
    foreign = Foreign()
    model.transformer_blocks[1].attn.set_processor(foreign)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn has a Foreign, which is not a default"):
        apply_clear(model, radius=2)
    assert not clear_processors(model) and not model._forward_pre_hooks
    assert "transformer_blocks.1.attn" in apply_clear(model, radius=2, exclude=["transformer_blocks.1.attn"]).skipped
    assert model.transformer_blocks[1].attn.processor is foreign


def test_replaced_processors_are_detected():
    model, inputs = tiny_sd3(), sd3_inputs()
    apply_clear(model, radius=2)
    model.set_attn_processor(JointAttnProcessor2_0())
    with pytest.raises(ValueError, match="was replaced by a JointAttnProcessor2_0"):
        run(model, inputs)
    remove_clear(model)
    run(model, inputs)


def test_layers_called_alone_and_ip_adapters():
    model, inputs = tiny_flux(), flux_inputs()
    apply_clear(model, radius=2)
    with pytest.raises(ValueError, match="without the grid"):
        model.single_transformer_blocks[0].attn(torch.randn(1, 20, 32))
    with pytest.raises(ValueError, match="IP-Adapter"):
        run(model, inputs, ip_adapter_image_embeds=[torch.randn(1, 4)])


@pytest.mark.parametrize(
    "module",
    ["clear", "clear.weights", "clear.high_resolution", "clear.parallel", "clear.distillation_data", "clear.example"],
)
def test_without_diffusers_the_extra_is_named(module):
    code = f"import sys; sys.modules['diffusers'] = None; import hf_attn.patching.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "pip install 'hf_attn[diffusers]'" in done.stderr
