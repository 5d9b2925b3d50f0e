# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of HAT."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import FACTOR, FINITE, SIZE
from hf_attn.architectures.restoration.configuration import ImageRestorationConfig


_HAT_S = {"embed_dim": 144, "compress_ratio": 24, "squeeze_factor": 24}
_HAT_L = {"depths": [6] * 12, "num_heads": [6] * 12}


@strict
class HATConfig(ImageRestorationConfig):
    r"""Configuration of a [`HATForImageSuperResolution`]; the defaults are HAT x4.

    The fields of the shell (`embed_dim`, `depths`, `window_size`, `upscale`...) are those of
    [`~hf_attn.architectures.restoration.configuration.ImageRestorationConfig`].

    Args:
        compress_ratio (`int`): the convolutions of the channel attention block work on `embed_dim // compress_ratio`.
        squeeze_factor (`int`): the channel attention squeezes to `embed_dim // squeeze_factor`.
        conv_scale (`float`): factor of the channel attention block in its sum with the window attention.
        overlap_ratio (`float`): the keys of the overlapping cross-attention are windows of
            `window_size + int(overlap_ratio * window_size)`.
    """

    model_type = "hat"
    variants = {
        f"{name}_x{scale}": {**fields, "upscale": scale}
        for name, fields in (("hat_s", _HAT_S), ("hat", {}), ("hat_l", _HAT_L))
        for scale in (2, 3, 4)
    }

    tiny = {
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "compress_ratio": 4,
        "squeeze_factor": 4,
        "image_size": 8,
        "upscale": 2,
    }
    ranges = {"compress_ratio": SIZE, "squeeze_factor": SIZE, "conv_scale": FINITE, "overlap_ratio": FACTOR}

    compress_ratio: int = 3
    squeeze_factor: int = 30
    conv_scale: float | int = 0.01
    overlap_ratio: float | int = 0.5

    @property
    def overlap_window_size(self) -> int:
        """Side of the windows of keys in the overlapping cross-attention."""
        return self.window_size + int(self.overlap_ratio * self.window_size)

    def validate_hat(self):
        """Part of the validation that `@strict` runs."""
        for name in ("compress_ratio", "squeeze_factor"):
            value = getattr(self, name)
            if value > self.embed_dim:
                raise ValueError(f"{name} must be at most embed_dim ({self.embed_dim}), got {value}.")
        overlap = self.overlap_window_size - self.window_size
        if overlap % 2:
            raise ValueError(
                f"overlap_ratio={self.overlap_ratio} enlarges windows of {self.window_size} by {overlap} pixels, "
                f"which must be an even number. Use an overlap_ratio with int(overlap_ratio * {self.window_size}) "
                "even, or another window_size."
            )


__all__ = ["HATConfig"]
