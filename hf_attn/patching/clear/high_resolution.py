"""High resolutions with CLEAR, coarse to fine.

    images = generate_high_resolution(pipe, "a cat", sizes=[1024, 2048, 4096], clear_weights="clear_local_8")

The first image is an ordinary one. Each further stage enlarges the image before, adds noise to it and denoises it again
with local attention, whose logits are scaled by the length of the sequence, and with a stretched position encoding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from .patch import clear_processors
from .processors import diffusers
from .weights import clear_weights_loaded


try:
    from PIL import Image
except ImportError as error:
    raise ImportError("Images are drawn with Pillow: `pip install 'hf_attn[vision]'`.") from error


@contextmanager
def ntk_scaled(transformer: nn.Module, factor: float) -> Iterator[None]:
    """Stretch the rotary position encoding of a FLUX transformer, for images larger than it was trained on.

    Args:
        transformer: a FLUX transformer; its base of the rotary frequencies is multiplied on all axes.
        factor: the paper uses 10 beyond 1024 x 1024 pixels.

    Raises:
        TypeError: if the model has no rotary position encoding, as SD3.
    """
    encoding = getattr(transformer, "pos_embed", None)
    if not hasattr(encoding, "theta"):
        raise TypeError(f"{type(transformer).__name__} has no rotary position embedding to rescale.")
    theta = encoding.theta
    encoding.theta = theta * factor
    try:
        yield
    finally:
        encoding.theta = theta


@torch.no_grad()
def generate_high_resolution(
    pipe: "diffusers.FluxPipeline",
    prompt: str,
    sizes: Sequence[int | tuple[int, int]] = (1024, 2048, 4096),
    *,
    clear_weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.5,
    strength: float = 0.7,
    refinement_guidance_scale: float = 7.5,
    ntk_factor: float = 10.0,
    max_sequence_length: int = 512,
    seed: int = 0,
    folder: str | Path | None = None,
    start_stage: int = 0,
    image: Image.Image | None = None,
    joint_attention_kwargs: Mapping[str, object] | None = None,
) -> list[Image.Image]:
    """Generate an image larger than the model was trained for, by the recipe of CLEAR's official code.

    The state of the pipeline is restored: weights, scheduler, VAE and progress bar.

    Args:
        pipe: a FLUX pipeline.
        prompt: text.
        sizes: of the images of all stages in pixels, a side of a square or `(height, width)`. The first is one that the
            model was trained for. Multiples of 16, or of 16 times the down factor of CLEAR.
        clear_weights: what [`hf_attn.patching.clear.weights.load_clear_weights`] takes. The first stage is computed by
            the model as it is, the others with these. None: the transformer has CLEAR, and all stages use it.
        num_inference_steps: of a schedule; of those of a further stage the last `strength * num_inference_steps` are done.
        guidance_scale: of the first stage.
        strength: strength of the noise that is added to an enlarged image, in (0, 1].
        refinement_guidance_scale: of further stages.
        ntk_factor: how much the position encoding is stretched in further stages, see [`ntk_scaled`].
        max_sequence_length: tokens to which the text is padded.
        seed: stage i draws its noise from `seed + i`.
        folder: folder in which the image of each stage is saved once it is finished, as `stage_0_1024x1024.png` and so on.
        start_stage: first stage to run; resuming gives the same images as an uninterrupted call.
        image: of the stage before `start_stage`; read from the folder by default.
        joint_attention_kwargs: passed to the transformer in all stages, such as the scale of a LoRA adapter.

    Returns:
        Images of the stages that were computed, the largest last.

    Raises:
        TypeError: if the pipeline is not one of FLUX.
        ValueError: for sizes that do not fit or shrink, a transformer without CLEAR and without weights for it, or a
            strength that leaves no step to do.
        FileNotFoundError: if the image to continue from is not in the folder.
    """
    if not isinstance(pipe, diffusers.FluxPipeline):
        raise TypeError(f"This recipe needs a FluxPipeline, got a {type(pipe).__name__}.")
    stages = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    local = clear_processors(pipe.transformer)
    if bool(local) == (clear_weights is not None):
        raise ValueError(
            "The transformer already has CLEAR attention: call `remove_clear`, or leave out `clear_weights`."
            if local
            else "The transformer has full attention, which is too expensive for large images: pass `clear_weights`, "
            "or call `load_clear_weights` or `apply_clear` first."
        )
    if not 1 / num_inference_steps <= strength <= 1:
        raise ValueError(
            f"strength must be at most 1 and large enough for at least one of {num_inference_steps} steps, got "
            f"{strength}."
        )
    if not 0 <= start_stage < len(stages):
        raise ValueError(f"start_stage must be one of the {len(stages)} stages, counted from 0, got {start_stage}.")
    folder = None if folder is None else Path(folder)
    if start_stage and image is None:
        image = _read(folder, start_stage - 1, stages)

    def clear():
        return nullcontext() if clear_weights is None else clear_weights_loaded(pipe.transformer, clear_weights)

    # Weights that do not fit are found before the first image is made.
    with clear():
        processors = clear_processors(pipe.transformer).values()
        _check_sizes(stages, 2 * pipe.vae_scale_factor * max(processor.down_factor for processor in processors))

    text, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=max_sequence_length)
    common = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "num_inference_steps": num_inference_steps,
    }
    images = []
    with _settings_kept(pipe):
        if start_stage == 0:
            height, width = stages[0]
            _announce(pipe, 0, stages)
            images += pipe(
                **common,
                height=height,
                width=width,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                joint_attention_kwargs=dict(joint_attention_kwargs or {}),
            ).images
            image = _keep(images[-1], folder, 0, stages)
        pipe.vae.enable_tiling()
        # The enlarged images are denoised on the schedule that does not depend on their size.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, use_dynamic_shifting=False
        )
        refine = diffusers.FluxImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
        with clear(), ntk_scaled(pipe.transformer, ntk_factor):
            for stage in range(max(1, start_stage), len(stages)):
                height, width = stages[stage]
                _announce(refine, stage, stages, like=pipe)
                images += refine(
                    **common,
                    image=image.resize((width, height), Image.Resampling.BICUBIC),
                    height=height,
                    width=width,
                    strength=strength,
                    guidance_scale=refinement_guidance_scale,
                    generator=torch.Generator().manual_seed(seed + stage),
                    joint_attention_kwargs={**(joint_attention_kwargs or {}), "proportional_attention": True},
                ).images
                image = _keep(images[-1], folder, stage, stages)
    return images


def _check_sizes(stages: list[tuple[int, int]], multiple: int) -> None:
    for height, width in stages:
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(f"Sizes must be multiples of {multiple} pixels, got {height} x {width}.")
    for before, after in pairwise(stages):
        if any(old > new for old, new in zip(before, after, strict=True)):
            raise ValueError(f"Each stage must enlarge the image, but {after} follows {before} (height, width).")


@contextmanager
def _settings_kept(pipe: "diffusers.FluxPipeline") -> Iterator[None]:
    """Restore the VAE's tiling and the settings of the progress bar."""
    tiling, progress = pipe.vae.use_tiling, getattr(pipe, "_progress_bar_config", {})
    try:
        yield
    finally:
        pipe.vae.use_tiling = tiling
        pipe.set_progress_bar_config(**progress)


def _announce(pipe, stage: int, stages: list[tuple[int, int]], like=None) -> None:
    """Let the progress bar say which stage it is of."""
    height, width = stages[stage]
    settings = getattr(like or pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**settings, "desc": f"stage {stage + 1} of {len(stages)}, {height} x {width}"})


def _path(folder: Path, stage: int, stages: list[tuple[int, int]]) -> Path:
    height, width = stages[stage]
    return folder / f"stage_{stage}_{height}x{width}.png"


def _keep(image: Image.Image, folder: Path | None, stage: int, stages: list[tuple[int, int]]) -> Image.Image:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        image.save(_path(folder, stage, stages))
    return image


def _read(folder: Path | None, stage: int, stages: list[tuple[int, int]]) -> Image.Image:
    if folder is None:
        raise ValueError(
            f"To continue with stage {stage + 1}, pass the `image` of stage {stage}, or the `folder` that contains it."
        )
    path = _path(folder, stage, stages)
    if not path.is_file():
        raise FileNotFoundError(f"There is no image of stage {stage} to continue from: {path} does not exist.")
    with Image.open(path) as image:
        return image.convert("RGB")
