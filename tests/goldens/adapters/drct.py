"""DRCT, and the padding and tile averaging of its inference script."""

import re

import torch

from hf_attn.architectures.restoration.layers import pad_to_multiple
from hf_attn.checkpoints.official import from_official
from hf_attn.restoration.tiling import restore_image
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    computed = {}
    for implementation in ("eager", "sdpa"):
        model = from_official("drct", case.weights, config=case.config)
        model.set_attn_implementation(implementation)
        computed |= {f"{name}@{implementation}": array for name, array in _network(case, model).items()}
    return computed


def _network(case: Case, model) -> dict[str, torch.Tensor]:
    pixel_values = case.input("pixel_values").clone().requires_grad_()
    group = model.drct.groups[0]
    taps = {"group0": group, "final_norm": model.drct.layernorm}
    taps |= {f"group0_swin{index}": block for index, block in enumerate(group.blocks, start=1)}
    taps |= {f"group0_adjust{index}": adjust for index, adjust in enumerate(group.adjust, start=1)}
    with recorded(taps) as seen:
        computed = {"reconstruction": model(pixel_values).reconstruction}
    (computed["reconstruction"] * case.input("projection")).sum().backward()
    computed["grad_pixel_values"] = pixel_values.grad
    computed |= seen

    odd = case.optional_input("odd_pixel_values")
    if odd is not None:
        window, scale = model.config.window_size, model.config.upscale
        computed["odd_padded"] = pad_to_multiple(odd, window, "symmetric")

        def restore(tiles: torch.Tensor) -> torch.Tensor:
            return model(tiles).reconstruction

        with torch.no_grad():
            computed["odd_reconstruction"] = restore_image(restore, odd, scale, window, padding="symmetric")
            if "odd_reconstruction_tiled" not in case.info["outputs"]:
                return computed
            # "tile 8, overlap 4, ..."
            tile, overlap = map(int, re.findall(r"\d+", case.info["outputs"]["odd_reconstruction_tiled"])[:2])
            computed["odd_reconstruction_tiled"] = restore_image(
                restore, odd, scale, window, tile=tile, tile_overlap=overlap, blend="mean", padding="symmetric"
            )
    return computed
