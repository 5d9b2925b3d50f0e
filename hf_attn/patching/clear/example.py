"""A FLUX pipeline of half a million parameters that is made here and learns on a CPU: the example of CLEAR's scripts.

It has every part of a real one, tokenizers, text encoders, transformer, VAE and scheduler, and saves and loads like it.
Its training images are flat colours with a faint wave across the whole image, whose direction is that of the prompt. Noise hides
them from every single token, so the transformer learns to average over the image: local attention changes what it
computes, as in a real model.
"""

import math
import string

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .distillation import image_ids, pack_latents, unpack_latents
from .processors import diffusers


#: pixels to the side of a token: this VAE keeps the resolution, and FLUX packs 2 x 2
PIXELS_OF_A_TOKEN = 2
TEXT_LENGTH = 4
DIRECTIONS = ("right", "up", "left", "down", "east", "north", "west", "south")
_TEXT_DIM = 32
_GUIDANCE = 3.5


def tiny_flux_pipeline(seed: int = 0, text_length: int = 77) -> "diffusers.FluxPipeline":
    """A FLUX pipeline with random weights; its images have twice as many pixels to a side as its grid has tokens.

    Args:
        seed: of the weights.
        text_length: tokens of a prompt, at most, for the encoder of the pooled text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        letters = string.ascii_lowercase
        clip_words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        clip = CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=_TEXT_DIM,
            intermediate_size=_TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=text_length,
            projection_dim=_TEXT_DIM,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        t5_pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
        t5_pieces += [(letter, -3.0) for letter in letters] + [(f"▁{word}", -1.0) for word in DIRECTIONS]
        t5 = T5Config(
            vocab_size=len(t5_pieces),
            d_model=_TEXT_DIM,
            d_kv=8,
            d_ff=_TEXT_DIM,
            num_layers=2,
            num_heads=4,
            initializer_factor=1.0,
        )
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=4,  # the last of them is one whose attention the distillation compares
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=_TEXT_DIM,
            pooled_projection_dim=_TEXT_DIM,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,),
            latent_channels=4,
            norm_num_groups=1,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5,
            shift_factor=0.1,
        )
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae,
            text_encoder=CLIPTextModel(clip),
            tokenizer=CLIPTokenizer(
                vocab={word: i for i, word in enumerate(clip_words)}, merges=[], model_max_length=text_length
            ),
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=T5TokenizerFast(vocab=t5_pieces, extra_ids=0, model_max_length=text_length),
            transformer=transformer,
        )
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def train_tiny_flux(
    pipe: "diffusers.FluxPipeline", grid: tuple[int, int], steps: int = 300, batch_size: int = 16, seed: int = 0
) -> list[float]:
    """Train the transformer of [`tiny_flux_pipeline`] on its images by flow matching, in place.

    Args:
        pipe: the pipeline.
        grid: `(height, width)` of the images in tokens.
        steps: optimiser steps.
        batch_size: images of a step.
        seed: of images, noise and noise levels.

    Returns:
        The loss of each step.
    """
    transformer, generator = pipe.transformer, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(list(DIRECTIONS), None, max_sequence_length=TEXT_LENGTH)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in tqdm(range(steps), desc="training the tiny teacher"):
        directions = torch.randint(len(DIRECTIONS), (batch_size,), generator=generator)
        latents = _latents(directions, grid, generator)
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = torch.rand(batch_size, generator=generator)
        level = sigmas.view(-1, 1, 1, 1)
        tokens = transformer(
            hidden_states=pack_latents((1 - level) * latents + level * noise),
            encoder_hidden_states=text[directions],
            pooled_projections=pooled[directions],
            timestep=sigmas,
            img_ids=image_ids(*grid),
            txt_ids=torch.zeros(text.shape[1], 3),
            guidance=torch.full((batch_size,), _GUIDANCE),
            return_dict=False,
        )[0]
        loss = F.mse_loss(unpack_latents(tokens, *grid), noise - latents)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _latents(directions: torch.Tensor, grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Clean images `(batch, 4, 2 * height, 2 * width)`: a colour, and a wave of another along the direction."""
    colour, other = torch.randn(2, len(directions), 4, 1, 1, generator=generator)
    angle = (directions * math.pi / len(DIRECTIONS)).view(-1, 1, 1)
    y, x = (torch.linspace(-1, 1, 2 * size) for size in grid)
    wave = torch.sin(3 * (torch.cos(angle) * y[:, None] + torch.sin(angle) * x))
    return 0.8 * (colour + 0.25 * other * wave[:, None])
