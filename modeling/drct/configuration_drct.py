# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Configuration of DRCT."""

from huggingface_hub.dataclasses import strict

from hf_attn.architectures.ranges import SIZE
from hf_attn.architectures.restoration.configuration import ImageRestorationConfig


_DRCT_L = {"depths": [6] * 12, "num_heads": [6] * 12}


@strict
class DRCTConfig(ImageRestorationConfig):
    r"""Configuration of a [`DRCTForImageSuperResolution`]; the defaults are DRCT x4.

    The fields of the shell (`embed_dim`, `num_heads`, `window_size`, `upscale`...) are those of
    [`~hf_attn.architectures.restoration.configuration.ImageRestorationConfig`]. A group has five blocks, independent of its
    entry in `depths`, which only shapes the schedule of the stochastic depth.

    Args:
        growth_channels (`int`): width that each of the first four blocks of a group adds to the next.
    """

    model_type = "drct"
    variants = {
        f"{name}_x{scale}": {**fields, "upscale": scale}
        for name, fields in (("drct", {}), ("drct_l", _DRCT_L))
        for scale in (2, 3, 4)
    }

    tiny = {
        "embed_dim": 16,
        "depths": [6, 6],
        "num_heads": [2, 2],
        "window_size": 4,
        "growth_channels": 4,
        "image_size": 8,
        "upscale": 3,
    }
    ranges = {"growth_channels": SIZE}

    growth_channels: int = 32

    def block_dims(self) -> list[int]:
        """Width of the tokens in each of the five blocks of a group."""
        return [self.embed_dim + block * self.growth_channels for block in range(5)]

    def block_heads(self, group: int) -> list[int]:
        """Number of attention heads in each of the five blocks of a group."""
        num_heads = self.num_heads[group]
        return [num_heads, *(num_heads - dim % num_heads for dim in self.block_dims()[1:])]

    def validate_drct(self):
        """Part of the validation that `@strict` runs."""
        for group, num_heads in enumerate(self.num_heads):
            pairs = list(zip(self.block_dims(), self.block_heads(group), strict=True))
            if all(dim % heads == 0 for dim, heads in pairs):
                continue
            works = [heads for heads in range(1, self.embed_dim + 1) if self._heads_divide(heads)]
            raise ValueError(
                f"The blocks of group {group} would have the widths {[dim for dim, _ in pairs]} and the numbers of "
                f"heads {[heads for _, heads in pairs]} (num_heads - width % num_heads). Each width must be a "
                f"multiple of its number of heads. With embed_dim={self.embed_dim} and "
                f"growth_channels={self.growth_channels} num_heads can be {works}, not {num_heads}."
            )

    def _heads_divide(self, num_heads: int) -> bool:
        first, *others = self.block_dims()
        return first % num_heads == 0 and all(dim % (num_heads - dim % num_heads) == 0 for dim in others)


__all__ = ["DRCTConfig"]
