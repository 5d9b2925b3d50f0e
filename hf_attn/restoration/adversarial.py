"""Losses and discriminator of the adversarial stage of Real-HAT and Real-DRCT (Real-ESRGAN's, arXiv 2107.10833)."""

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class UNetDiscriminator(nn.Module):
    """U-Net discriminator with spectral normalisation and one score per pixel.

    Args:
        num_channels: channels of the image.
        num_features: width of the first level; each of the three levels below has twice that of the one above.
    """

    def __init__(self, num_channels: int = 3, num_features: int = 64):
        super().__init__()
        widths = [num_features * 2**level for level in range(4)]
        self.first = nn.Conv2d(num_channels, num_features, 3, padding=1)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(above, below, 4, stride=2, padding=1, bias=False))
            for above, below in pairwise(widths)
        )
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(below, above, 3, padding=1, bias=False))
            for below, above in pairwise(reversed(widths))
        )
        self.refine = nn.ModuleList(
            spectral_norm(nn.Conv2d(num_features, num_features, 3, padding=1, bias=False)) for _ in range(2)
        )
        self.last = nn.Conv2d(num_features, 1, 3, padding=1)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)`, sides multiples of 8 -> logits `(batch, 1, height, width)`.

        Raises:
            ValueError: for other sides.
        """
        if any(side % 8 or not side for side in images.shape[-2:]):
            raise ValueError(
                f"Height and width of the images must be positive multiples of 8, got {tuple(images.shape[-2:])}."
            )
        features = self.activation(self.first(images))
        skips = []
        for convolution in self.down:
            skips.append(features)
            features = self.activation(convolution(features))
        for convolution, skip in zip(self.up, reversed(skips), strict=True):
            features = F.interpolate(features, scale_factor=2, mode="bilinear")
            features = self.activation(convolution(features)) + skip
        for convolution in self.refine:
            features = self.activation(convolution(features))
        return self.last(features)


class PerceptualLoss(nn.Module):
    """Distance of images in VGG19: weighted mean absolute differences of features before their ReLU.

    Args:
        weights: torchvision's `vgg19(weights="IMAGENET1K_V1").state_dict()`, or a file that holds it.

    Raises:
        ImportError: without torchvision.
        ValueError: if these are not weights of VGG19.
    """

    #: layer of `vgg19().features` -> weight: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4
    layers = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}

    def __init__(self, weights: Mapping[str, torch.Tensor] | str | os.PathLike):
        super().__init__()
        try:
            from torchvision.models import vgg19
        except ImportError as error:
            raise ImportError("The perceptual loss needs torchvision: pip install 'hf_attn[vision]'.") from error
        if not isinstance(weights, Mapping):
            weights = torch.load(weights, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            self.features = vgg19().features[: max(self.layers) + 1]
        wanted = {name: f"features.{name}" for name in self.features.state_dict()}
        if missing := [key for key in wanted.values() if key not in weights]:
            raise ValueError(
                f"These are not weights of torchvision's vgg19: {missing[0]} is missing. Save "
                "`torchvision.models.vgg19(weights='IMAGENET1K_V1').state_dict()` and pass that file."
            )
        self.features.load_state_dict({name: weights[key] for name, key in wanted.items()}, assign=True)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                # It would overwrite the features that are compared.
                layer.inplace = False
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of RGB images in [0, 1], `(batch, 3, height, width)`, of at least 16x16 pixels."""
        loss = images.new_zeros(())
        with torch.no_grad():
            targets = self._extract(targets)
        for (index, features), target in zip(self._extract(images).items(), targets.values(), strict=True):
            loss = loss + self.layers[index] * F.l1_loss(features, target)
        return loss

    def _extract(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        features, extracted = (images - self.mean) / self.std, {}
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in self.layers:
                extracted[index] = features
        return extracted


def generator_loss(logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy between the scores of generated images and the label "real"."""
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def discriminator_loss(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of logits of real images with "real" and of generated ones with "generated"."""
    return F.binary_cross_entropy_with_logits(real, torch.ones_like(real)) + F.binary_cross_entropy_with_logits(
        generated, torch.zeros_like(generated)
    )
