"""The coarse-to-fine recipe on a tiny FLUX pipeline."""

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import ImageChops

from hf_attn.patching.clear import apply_clear, clear_processors, processors
from hf_attn.patching.clear.example import tiny_flux_pipeline
from hf_attn.patching.clear.high_resolution import generate_high_resolution
from hf_attn.patching.clear.weights import save_clear_weights


SIZES = [(8, 12), (16, 24), (24, 32)]
SHORT = {"num_inference_steps": 4, "max_sequence_length": 4}


@pytest.fixture
def pipe():
    pipe = tiny_flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights_file(pipe, folder, down_factor=1):
    """CLEAR weights that differ from those of the pipeline."""
    transformer = tiny_flux_pipeline(seed=1).transformer
    apply_clear(transformer, radius=2, down_factor=down_factor)
    return save_clear_weights(transformer, folder)


def same(one, two):
    return one.size == two.size and ImageChops.difference(one, two).getbbox() is None


def test_stages_and_what_the_transformer_is_called_with(pipe, monkeypatch, tmp_path):
    calls, attended = [], []

    def record(module, args, kwargs):
        processors = clear_processors(module)
        kwargs = kwargs if kwargs.get("hidden_states") is not None else {}
        calls.append(
            {
                "tokens": kwargs["hidden_states"].shape[1],
                "sigma": round(float(kwargs["timestep"][0]), 4),
                "guidance": float(kwargs["guidance"][0]),
                "theta": module.pos_embed.theta,
                "clear": bool(processors),
                "tiling": pipe.vae.use_tiling,
            }
        )

    def attend(*arguments, scaling=None, **kwargs):
        attended.append(scaling)
        return computed(*arguments, scaling=scaling, **kwargs)

    computed = processors.clear_attention
    monkeypatch.setattr(processors, "clear_attention", attend)
    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe.scheduler.register_to_config(use_dynamic_shifting=True, shift=3.0)
    path = weights_file(pipe, tmp_path)
    images = generate_high_resolution(
        pipe, "north", SIZES, clear_weights=path, num_inference_steps=20, max_sequence_length=4
    )
    assert [image.size for image in images] == [(12, 8), (24, 16), (32, 24)]
    assert [call["tokens"] for call in calls] == [24] * 20 + [96] * 14 + [192] * 14
    first, refined = calls[:20], calls[20:]
    assert all(c["guidance"] == 3.5 and c["theta"] == 10000 and not c["clear"] and not c["tiling"] for c in first)
    assert all(c["guidance"] == 7.5 and c["theta"] == 100000 and c["clear"] and c["tiling"] for c in refined)
    # The schedule of the official code as diffusers computes it, with a shift of 3 and no dynamic one.
    assert [c["sigma"] for c in refined[:3]] == [0.875, 0.8478, 0.8182]
    assert [c["sigma"] for c in refined[:14]] == [c["sigma"] for c in refined[14:]]
    scalings = {processors.proportional_scaling(16, 4 + tokens) for tokens in (96, 192)}
    assert set(attended) == scalings


def test_the_pipeline_is_not_changed(pipe, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    settings = dict(pipe.scheduler.config), pipe.scheduler, dict(pipe._progress_bar_config)
    arguments = {"sizes": SIZES[:2], "clear_weights": weights_file(pipe, tmp_path), **SHORT}
    first = generate_high_resolution(pipe, "north", **arguments)
    assert (dict(pipe.scheduler.config), pipe.scheduler, pipe._progress_bar_config) == settings
    assert not pipe.vae.use_tiling and not clear_processors(pipe.transformer)
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    second = generate_high_resolution(pipe, "north", **arguments)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_the_weights_matter_in_further_stages_only(pipe, tmp_path):
    with_weights = generate_high_resolution(
        pipe, "north", SIZES[:2], clear_weights=weights_file(pipe, tmp_path), **SHORT
    )
    plain = pipe(
        "north", height=8, width=12, guidance_scale=3.5, generator=torch.Generator().manual_seed(0), **SHORT
    ).images[0]
    assert same(with_weights[0], plain)
    apply_clear(pipe.transformer, radius=2)
    with_clear = generate_high_resolution(pipe, "north", SIZES[:2], **SHORT)
    assert not same(with_weights[1], with_clear[1])
    assert clear_processors(pipe.transformer)


@pytest.mark.parametrize("stage", [1, 2])
def test_continued_from_a_stage_it_gives_the_same_images(pipe, stage, tmp_path):
    apply_clear(pipe.transformer, radius=2)
    arguments = {"sizes": SIZES, "folder": tmp_path, **SHORT}
    whole = generate_high_resolution(pipe, "north", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage_0_8x12.png",
        "stage_1_16x24.png",
        "stage_2_24x32.png",
    ]
    continued = generate_high_resolution(pipe, "north", start_stage=stage, **arguments)
    assert len(continued) == 3 - stage
    assert all(same(a, b) for a, b in zip(continued, whole[stage:], strict=True))
    given = generate_high_resolution(pipe, "north", SIZES, start_stage=stage, image=whole[stage - 1], **SHORT)
    assert all(same(a, b) for a, b in zip(given, whole[stage:], strict=True))


def test_an_interrupted_call_leaves_its_images(pipe, tmp_path, monkeypatch):
    def interrupted(self, *arguments, **kwargs):
        raise KeyboardInterrupt

    path = weights_file(pipe, tmp_path / "weights")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FluxImg2ImgPipeline, "__call__", interrupted)
        generate_high_resolution(pipe, "north", SIZES, clear_weights=path, folder=tmp_path / "images", **SHORT)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["stage_0_8x12.png"]
    assert not clear_processors(pipe.transformer) and pipe.transformer.pos_embed.theta == 10000


def test_progress_says_which_stage_it_is(pipe, capsys):
    pipe.set_progress_bar_config(leave=True)
    apply_clear(pipe.transformer, radius=2)
    generate_high_resolution(pipe, "north", SIZES[:2], **SHORT)
    shown = capsys.readouterr().err
    assert "stage 1 of 2, 8 x 12" in shown and "stage 2 of 2, 16 x 24" in shown


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sizes": [(8, 12), (15, 24)]}, ValueError, "multiples of 2 pixels, got 15 x 24"),
        ({"sizes": [16, 8]}, ValueError, r"\(8, 8\) follows \(16, 16\)"),
        ({"strength": 0.1}, ValueError, "large enough for at least one of 4 steps, got 0.1"),
        ({"start_stage": 3}, ValueError, "one of the 3 stages, counted from 0, got 3"),
        ({"start_stage": 1}, ValueError, "pass the `image` of stage 0, or the `folder`"),
        ({"clear_weights": "clear_local_8"}, ValueError, "already has CLEAR attention"),
    ],
)
def test_bad_input(pipe, change, error, message):
    apply_clear(pipe.transformer, radius=2)
    with pytest.raises(error, match=message):
        generate_high_resolution(pipe, "north", **{"sizes": SIZES, **SHORT, **change})


def test_more_bad_input(pipe, tmp_path):
    with pytest.raises(ValueError, match="has full attention, which is too expensive for large images"):
        generate_high_resolution(pipe, "north", SIZES)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 8 x 12"):
        generate_high_resolution(pipe, "north", SIZES, clear_weights=weights_file(pipe, tmp_path, 4), **SHORT)
    apply_clear(pipe.transformer, radius=2)
    with pytest.raises(FileNotFoundError, match=r"stage_0_8x12\.png does not exist"):
        generate_high_resolution(pipe, "north", SIZES, folder=tmp_path, start_stage=1, **SHORT)
    with pytest.raises(TypeError, match="needs a FluxPipeline, got a FluxTransformer2DModel"):
        generate_high_resolution(pipe.transformer, "north", SIZES)
