"""Heads of known patterns, on a grid of 7 x 7 patches."""

import torch

from hf_attn.analysis.vit.hops import Grid


GRID = Grid(7, 7, num_prefix_tokens=0)
KINDS = ("self", "neighbourhood", "row", "shifted", "key-driven", "diffuse")


def synthetic_heads(per_kind: int = 12, seed: int = 0) -> torch.Tensor:
    """`(6 * per_kind, patches, patches)` soft-max maps, kind by kind."""
    generator = torch.Generator().manual_seed(seed)
    hops = GRID.hops()
    row, col = GRID._positions()
    same_row = (row[:, None] == row).float()
    below = ((row == row[:, None] + 1) & (col == col[:, None])).float()
    maps = []
    for kind in KINDS:
        for _ in range(per_kind):
            logits = 0.7 * torch.randn(GRID.num_patches, GRID.num_patches, generator=generator)
            keys = 1.8 * torch.randn(GRID.num_patches, generator=generator)
            logits += {
                "self": 4 * (hops == 0),
                "neighbourhood": 3 * (hops <= 1),
                "row": 3 * same_row,
                "shifted": 3 * below,
                "key-driven": keys,
                "diffuse": torch.zeros(()),
            }[kind]
            maps.append(logits.softmax(-1))
    return torch.stack(maps)
