"""What CLEAR's distillation learns from: latents that the teacher generates from prompts, kept in a folder.

The paper trains on images of the model itself; real ones gave worse results in its ablation. A sample is one file with the
clean latent and the encoded prompt, so that text encoders and VAE are not in memory during training. For FLUX.1-dev at
1024 x 1024 pixels and 512 text tokens it takes 4.5 MB.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ...training.writing import written_whole
from .distillation import unpack_latents
from .processors import diffusers


@torch.no_grad()
def generate_samples(
    pipe: "diffusers.FluxPipeline",
    prompts: Sequence[str],
    folder: str | Path,
    *,
    height: int,
    width: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.5,
    max_sequence_length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Generate one image per prompt and keep its latent; skips those that exist.

    Args:
        pipe: the teacher's pipeline.
        prompts: texts; the same one twice gives two images.
        folder: made if it does not exist.
        height: of the images, in pixels.
        width: of the images, in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: guidance scale passed to guidance-distilled models.
        max_sequence_length: tokens to which the text is padded.
        batch_size: images generated together.
        seed: seed of the noise; sample i depends only on `seed + i` and its prompt.
        process_index: which part of the prompts this process takes.
        num_processes: number of processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left = [i for i in range(process_index, len(prompts), num_processes) if not _path(folder, i).exists()]
    shown = dict(pipe._progress_bar_config) if hasattr(pipe, "_progress_bar_config") else {}
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    pixels_of_a_token = 2 * pipe.vae_scale_factor
    try:
        with tqdm(total=len(left), desc="generating samples", disable=process_index > 0 or not left) as progress:
            for start in range(0, len(left), batch_size):
                chosen = left[start : start + batch_size]
                text, pooled, _ = pipe.encode_prompt(
                    [prompts[i] for i in chosen], None, max_sequence_length=max_sequence_length
                )
                tokens = pipe(
                    prompt_embeds=text,
                    pooled_prompt_embeds=pooled,
                    height=height,
                    width=width,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(seed + i) for i in chosen],
                    output_type="latent",
                ).images
                latents = unpack_latents(tokens, height // pixels_of_a_token, width // pixels_of_a_token)
                for i, *tensors in zip(chosen, latents, text, pooled, strict=True):
                    _save(_path(folder, i), dict(zip(_FIELDS, tensors, strict=True)))
                    progress.update()
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **shown})


class SampleFolder(Dataset):
    """The samples of [`generate_samples`].

    An item is a dictionary of `latents` `(channels, 2 * height, 2 * width)`, height and width in tokens,
    `encoder_hidden_states` `(text, dim)` and `pooled_projections` `(dim,)`.

    Args:
        folder: where they are.
        num_samples: how many there must be.

    Raises:
        FileNotFoundError: if one is missing.
    """

    def __init__(self, folder: str | Path, num_samples: int):
        self.paths = [_path(Path(folder), i) for i in range(num_samples)]
        missing = [path.name for path in self.paths if not path.exists()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} of {num_samples} samples, such as {missing[0]}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self.paths[index])

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples stacked, on the CPU."""
        return torch.utils.data.default_collate([self[i] for i in indices])


_FIELDS = ("latents", "encoder_hidden_states", "pooled_projections")


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _save(path: Path, sample: dict[str, torch.Tensor]) -> None:
    with written_whole(path) as part:
        save_file({name: tensor.contiguous().cpu() for name, tensor in sample.items()}, part)
