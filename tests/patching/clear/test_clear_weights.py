"""CLEAR weights: official layouts, our own files, and models whose weights are stored elsewhere."""

import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hf_attn.patching.clear import apply_clear, clear_processors, remove_clear
from hf_attn.patching.clear import weights as clear_weights
from hf_attn.patching.clear.distillation import freeze_for_distillation
from hf_attn.patching.clear.weights import clear_weights_loaded, load_clear_weights, save_clear_weights

from .test_clear import MODELS, both, flux_inputs, run, sd3_inputs, tiny_flux, tiny_sd3


ADAPTER = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def trained(radius=2, down_factor=1):
    """A FLUX transformer with different attention weights from `tiny_flux`, and its official file as a dictionary."""
    model = tiny_flux()
    apply_clear(model, radius, down_factor)
    torch.manual_seed(3)
    official = freeze_for_distillation(model)
    with torch.no_grad():
        for parameter in official.values():
            parameter.normal_(std=0.2)
    return model, {name: parameter.detach().clone() for name, parameter in official.items()}


def official_file(folder, radius=2, down_factor=1):
    model, tensors = trained(radius, down_factor)
    path = folder / f"clear_local_{radius}{f'_down_{down_factor}' if down_factor > 1 else ''}.safetensors"
    save_file(tensors, path)
    return model, path


def inputs_for(down_factor):
    return flux_inputs(height=8, width=12) if down_factor > 1 else flux_inputs()


@pytest.mark.parametrize("down_factor", [1, 4])
def test_an_official_file(tmp_path, down_factor):
    expected, path = official_file(tmp_path, 2, down_factor)
    model, inputs = tiny_flux(), inputs_for(down_factor)
    report = load_clear_weights(model, path)
    assert (report.radius, report.down_factor) == (2, down_factor)
    # 2 double blocks with an output projection, 2 single ones without; weight and bias of each
    assert len(report.loaded) == 2 * 8 + 2 * 6 + (4 if down_factor > 1 else 0)
    assert torch.equal(run(model, inputs), run(expected, inputs))


def test_what_is_trained_is_what_the_official_files_hold():
    _, tensors = trained(down_factor=4)
    expected = {
        f"{block}.{i}.attn.{layer}.{kind}"
        for block in ("transformer_blocks", "single_transformer_blocks")
        for i in range(2)
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for kind in ("weight", "bias")
        if not (block == "single_transformer_blocks" and layer == "to_out.0")
    }
    blocks = {name.partition(".attn.")[0] for name in expected}
    assert tensors.keys() == expected | {f"{block}.attn.processor.spatial_weight" for block in blocks}


@both
@pytest.mark.parametrize("down_factor", [1, 2])
def test_a_file_of_our_own(tmp_path, kind, down_factor):
    make, make_inputs = MODELS[kind]
    model, inputs = make(), make_inputs(height=6, width=8)
    apply_clear(model, 3, down_factor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".to_v." in name or "spatial_weight" in name:
                parameter.normal_()
    path = save_clear_weights(model, tmp_path / "clear")
    for source in (path, path.parent, str(path.parent)):
        other = make()
        report = load_clear_weights(other, source)
        assert (report.radius, report.down_factor) == (3, down_factor)
        assert torch.equal(run(other, inputs), run(model, inputs))


def test_saved_weights_have_a_model_card(tmp_path):
    path = save_clear_weights(trained(3, 2)[0], tmp_path / "some-weights")
    card = ModelCard.load(path.parent / "README.md")
    assert card.data.library_name == "diffusers" and {"hf_attn", "clear"} <= set(card.data.tags)
    for fact in ("# some-weights", "FluxTransformer2DModel", "radius 3, down factor 2", "float32", "2412.16112"):
        assert fact in card.text
    assert f"{sum(tensor.numel() for tensor in load_file(path).values()):,} parameters" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    pipe = SimpleNamespace(transformer=tiny_flux())
    exec(code, {"pipe": pipe})
    assert clear_processors(pipe.transformer)

    (path.parent / "README.md").write_text("mine")
    save_clear_weights(trained(3, 2)[0], path.parent)
    assert (path.parent / "README.md").read_text() == "mine"


def test_weights_are_loaded_temporarily(tmp_path):
    expected, path = official_file(tmp_path)
    for fused in (False, True):
        model, inputs = tiny_flux(), flux_inputs()
        if fused:
            model.fuse_qkv_projections()
        before = run(model, inputs)
        with pytest.raises(KeyboardInterrupt), clear_weights_loaded(model, path) as report:
            assert report.radius == 2
            torch.testing.assert_close(run(model, inputs), run(expected, inputs), rtol=1e-4, atol=1e-5)
            raise KeyboardInterrupt
        assert torch.equal(run(model, inputs), before) and not clear_processors(model)
    with pytest.raises(ValueError, match="already has CLEAR attention"), clear_weights_loaded(expected, path):
        pass


def test_gathered_weights_are_saved_in_place_of_the_own_ones(tmp_path):
    model, tensors = trained()
    gathered = {name: tensor + 1 for name, tensor in tensors.items()}
    saved = load_file(save_clear_weights(model, tmp_path, {**model.state_dict(), **gathered}))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in saved.items())


def test_the_second_attention_of_sd3_is_in_the_file(tmp_path):
    model = tiny_sd3()
    apply_clear(model, 2)
    names = load_file(save_clear_weights(model, tmp_path)).keys()
    assert "transformer_blocks.0.attn2.to_out.0.weight" in names


@pytest.mark.parametrize("down_factor", [1, 4])
def test_after_lora(tmp_path, down_factor):
    _, path = official_file(tmp_path, 2, down_factor)
    inputs = inputs_for(down_factor)
    results = []
    for order in ("before", "after"):
        model = tiny_flux()
        if order == "before":
            load_clear_weights(model, path)
        torch.manual_seed(5)
        model.add_adapter(ADAPTER)
        if order == "after":
            load_clear_weights(model, path)
        results.append(run(model, inputs))
    assert torch.equal(*results)
    saved = load_file(save_clear_weights(model, tmp_path / "again"))
    assert saved.keys() == load_file(path).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in load_file(path).items())


def test_with_a_merged_adapter(tmp_path):
    _, path = official_file(tmp_path)
    model = tiny_flux()
    model.add_adapter(ADAPTER)
    model.fuse_lora()
    with pytest.raises(ValueError, match="An adapter is merged into"):
        load_clear_weights(model, path)
    model.unfuse_lora()
    load_clear_weights(model, path)


def test_with_fused_projections(tmp_path):
    expected, path = official_file(tmp_path)
    model, inputs = tiny_flux(), flux_inputs()
    model.fuse_qkv_projections()
    load_clear_weights(model, path)
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(run(model, inputs), run(expected, inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="are fused"):
        save_clear_weights(model, tmp_path)


def test_fused_projections_of_sd3(tmp_path):
    source, inputs = tiny_sd3(), sd3_inputs()
    apply_clear(source, 2)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if ".to_k." in name:
                parameter.normal_()
    path = save_clear_weights(source, tmp_path)
    model = tiny_sd3()
    model.fuse_qkv_projections()
    load_clear_weights(model, path)
    torch.testing.assert_close(run(model, inputs), run(source, inputs), rtol=1e-4, atol=1e-5)


def test_tensors_need_a_radius():
    expected, tensors = trained()
    with pytest.raises(ValueError, match="does not contain the radius that it was trained with: pass `radius=`"):
        load_clear_weights(tiny_flux(), tensors)
    model = tiny_flux()
    load_clear_weights(model, tensors, radius=2)
    assert torch.equal(run(model, flux_inputs()), run(expected, flux_inputs()))


def test_the_plain_file_after_the_pooled_one(tmp_path):
    expected, plain = official_file(tmp_path)
    _, pooled = official_file(tmp_path, 2, 4)
    model = tiny_flux()
    load_clear_weights(model, pooled)
    load_clear_weights(model, plain)
    assert torch.equal(run(model, flux_inputs()), run(expected, flux_inputs()))
    remove_clear(model)
    assert not clear_processors(model)


def test_weights_of_the_hub(tmp_path, monkeypatch):
    _, path = official_file(tmp_path, 8)
    asked = []
    monkeypatch.setattr(clear_weights, "hf_hub_download", lambda *what: asked.append(what) or str(path))
    load_clear_weights(tiny_flux(), "clear_local_8")
    load_clear_weights(tiny_flux(), "somebody/some-model/folder/clear_local_8.safetensors")
    assert asked == [
        ("Huage001/CLEAR", "clear_local_8.safetensors"),
        ("somebody/some-model", "folder/clear_local_8.safetensors"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer_blocks.0.attn.to_q.weight"),
            r"it lacks transformer_blocks\.0\.attn\.to_q\.weight",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "the model has no extra"),
        (
            lambda t: t.update({"transformer_blocks.0.attn.to_q.bias": torch.ones(3)}),
            r"to_q\.bias has shape \(3,\) instead of \(32,\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(change, message):
    _, tensors = trained()
    change(tensors)
    model = tiny_flux()
    before = run(model, flux_inputs())
    with pytest.raises(ValueError, match=message):
        load_clear_weights(model, tensors, radius=2)
    assert not clear_processors(model) and torch.equal(run(model, flux_inputs()), before)


def test_contradictions(tmp_path):
    _, path = official_file(tmp_path, 2, 4)
    with pytest.raises(ValueError, match="trained with radius = 2, but radius = 3 was passed"):
        load_clear_weights(tiny_flux(), path, radius=3)
    with pytest.raises(ValueError, match="trained with down_factor = 4, but down_factor = 1 was passed"):
        load_clear_weights(tiny_flux(), path, down_factor=1)
    renamed = path.rename(tmp_path / "clear_local_2.safetensors")
    with pytest.raises(ValueError, match=r"has down factor 1 .* its spatial weights have down factor 4"):
        load_clear_weights(tiny_flux(), renamed)
    with pytest.raises(FileNotFoundError, match="no CLEAR weights at 'nowhere'"):
        load_clear_weights(tiny_flux(), "nowhere")


def test_only_uniform_models_are_saved(tmp_path):
    model = tiny_flux()
    apply_clear(model, 2, include=["transformer_blocks.*"])
    with pytest.raises(ValueError, match=r"2 of 4 attention layers .* in \[\(2, 1\)\]"):
        save_clear_weights(model, tmp_path)
