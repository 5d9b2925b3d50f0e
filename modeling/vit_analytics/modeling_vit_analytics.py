# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""An auto-encoder that summarises the attention patterns of the heads of a vision transformer (after arXiv 2303.13731)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from hf_attn.hub import HubModelMixin

from .configuration_vit_analytics import VitPatternAutoencoderConfig


@dataclass
class VitPatternAutoencoderOutput(ModelOutput):
    """Output of [`VitPatternAutoencoder`].

    Args:
        loss: mean squared error of the reconstruction, in standardised units.
        latents: `(heads, latent_size)`.
        reconstruction: `(heads, patches, patches)`, attention maps.
    """

    loss: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class VitPatternAutoencoderPreTrainedModel(HubModelMixin, PreTrainedModel):
    config: VitPatternAutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "maps"
    _no_split_modules = []
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            # He initialisation: a unit of a transposed convolution hears a quarter of its kernel's entries.
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                fan_in = module.weight[:, 0].numel() / 4
            init.normal_(module.weight, std=self.config.initializer_range * (2 / fan_in) ** 0.5)
            init.zeros_(module.bias)


class VitPatternAutoencoder(VitPatternAutoencoderPreTrainedModel):
    """Convolutional auto-encoder whose samples are heads: the attention among patches, averaged over images.

    A map is scaled by the number of patches, so that uniform attention is 1 for any image size, then log(1 + x), then
    standardised by one mean and one standard deviation for all maps. Every convolution is 4 x 4 with stride 2.
    """

    def __init__(self, config: VitPatternAutoencoderConfig):
        super().__init__(config)
        channels = (1, *config.hidden_sizes)
        inner = channels[-1] * config.sizes[-1] ** 2
        self.encoder = nn.Sequential()
        for before, after in pairwise(channels):
            self.encoder.extend([nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()])
        self.to_latent = nn.Linear(inner, config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, inner)
        self.decoder = nn.Sequential()
        for level in reversed(range(len(config.hidden_sizes))):
            # A map of odd size lost its last row and column to the convolution.
            lost = config.sizes[level] % 2
            self.decoder.extend(
                [
                    nn.ReLU(),
                    nn.ConvTranspose2d(
                        channels[level + 1], channels[level], 4, stride=2, padding=1, output_padding=lost
                    ),
                ]
            )
        self.post_init()

    def _scaled(self, maps: torch.Tensor) -> torch.Tensor:
        patches = self.config.num_patches
        if maps.shape[-2:] != (patches, patches) or maps.dim() != 3:
            raise ValueError(
                f"maps must be attention among patches without prefix tokens, of shape (heads, {patches}, {patches}); "
                f"got {tuple(maps.shape)}."
            )
        return torch.log1p(maps * patches)

    @can_return_tuple
    def forward(self, maps: torch.Tensor | None = None, **kwargs: Any) -> VitPatternAutoencoderOutput:
        """Summarise maps and restore them.

        Args:
            maps: `(heads, patches, patches)`, rows of a soft-max without the columns of the prefix tokens.

        Raises:
            ValueError: for maps of another size.
        """
        if maps is None:
            raise ValueError("maps are missing: pass attention maps of shape (heads, patches, patches).")
        standardised = (self._scaled(maps) - self.config.map_mean) / self.config.map_std
        hidden = self.encoder(standardised[:, None])
        latents = self.to_latent(hidden.flatten(1))
        restored = self.decoder(self.from_latent(latents).unflatten(1, hidden.shape[1:]))[:, 0]
        unscaled = torch.expm1(restored * self.config.map_std + self.config.map_mean) / self.config.num_patches
        return VitPatternAutoencoderOutput(
            loss=nn.functional.mse_loss(restored, standardised), latents=latents, reconstruction=unscaled
        )

    def fit(
        self, maps: torch.Tensor, epochs: int = 200, learning_rate: float = 1e-3, batch_size: int = 32, seed: int = 0
    ) -> list[float]:
        """Train on the maps of heads with Adam, and take the standardisation from them.

        A model has few heads, 144 in ViT-B, so the auto-encoder overfits; compare it with the PCA of the maps.

        Args:
            maps: as for `forward`.
            epochs: passes over all maps.
            learning_rate: of Adam.
            batch_size: maps of a step.
            seed: of the order of the maps; `torch.manual_seed` before the model is made decides its weights.

        Returns:
            The mean loss of each epoch.

        Raises:
            ValueError: for fewer than two maps, maps that are all the same, or no epoch.
        """
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
        if len(maps) < 2:
            raise ValueError(f"An autoencoder needs the maps of at least 2 heads, got {len(maps)}.")
        maps = maps.to(self.to_latent.weight)
        scaled = self._scaled(maps)
        if scaled.amax() - scaled.amin() < 1e-6:  # rounding of the scaling apart
            raise ValueError("All maps are equal: there is nothing to learn.")
        self.config.map_mean, self.config.map_std = scaled.mean().item(), scaled.std().item()
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        order = torch.Generator().manual_seed(seed)
        training = self.training
        self.train()
        losses = []
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(maps), generator=order).split(batch_size):
                optimizer.zero_grad()
                loss = self(maps[batch.to(maps.device)]).loss
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / len(maps))
        self.train(training)
        return losses

    @torch.no_grad()
    def encode(self, maps: torch.Tensor) -> torch.Tensor:
        """The latents `(heads, latent_size)` of maps."""
        return self(maps.to(self.to_latent.weight)).latents.cpu()


__all__ = ["VitPatternAutoencoder", "VitPatternAutoencoderPreTrainedModel"]
