"""HAT, its tiles, and the metrics and bicubic resizing of its test harness."""

import re

import torch

from hf_attn.architectures.restoration.layers import pad_to_multiple, partition_windows
from hf_attn.checkpoints.official import from_official
from hf_attn.restoration.metrics import psnr, ssim, to_uint8
from hf_attn.restoration.resize import bicubic_resize
from hf_attn.restoration.tiling import restore_image
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    if "imresize" in case.entry:
        return _metrics(case)
    computed = {}
    for implementation in ("eager", "sdpa"):
        model = from_official("hat", case.weights, config=case.config)
        model.set_attn_implementation(implementation)
        computed |= {f"{name}@{implementation}": array for name, array in _network(case, model).items()}
    return computed


def _network(case: Case, model) -> dict[str, torch.Tensor]:
    pixel_values = case.input("pixel_values").clone().requires_grad_()
    base, group = model.hat, model.hat.groups[0]
    taps = {
        "conv_first": base.first_convolution,
        "group0_block0_window_attention": group.blocks[0].attention,
        "group0_block0_channel_branch": group.blocks[0].channel_branch,
        "group0_block0": group.blocks[0],
        "group0_overlap": group.overlapping_block,
        "group0": group,
        "final_norm": base.layernorm,
        "conv_after_body": base.conv_after_body,
    }
    if len(group.blocks) > 1:
        taps["group0_block1_shifted"] = group.blocks[1]
    with recorded(taps) as seen:
        computed = {"reconstruction": model(pixel_values).reconstruction}
    (computed["reconstruction"] * case.input("projection")).sum().backward()
    computed["grad_pixel_values"] = pixel_values.grad
    seen["group0_block0_window_attention"] = partition_windows(
        seen["group0_block0_window_attention"], model.config.window_size
    )
    computed |= seen

    odd = case.optional_input("odd_pixel_values")
    if odd is not None:
        window, scale = model.config.window_size, model.config.upscale
        computed["odd_padded"] = pad_to_multiple(odd, window)
        with torch.no_grad():
            computed["odd_reconstruction"] = model(odd).reconstruction
            if "odd_reconstruction_tiled" not in case.info["outputs"]:
                return computed
            # "tile mode, tile_size 8, tile_pad 4, ..."
            tile, pad = map(int, re.findall(r"\d+", case.info["outputs"]["odd_reconstruction_tiled"])[:2])
            computed["odd_reconstruction_tiled"] = restore_image(
                lambda tiles: model(tiles).reconstruction, odd, scale, window, tile=tile, tile_overlap=pad, blend="cut"
            )
    return computed


def _metrics(case: Case) -> dict[str, torch.Tensor]:
    prediction, reference = (to_uint8(case.input(name))[0] for name in ("sr", "gt"))
    computed = {"sr_uint8_rgb": prediction.permute(1, 2, 0), "gt_uint8_rgb": reference.permute(1, 2, 0)}
    for crop in case.config["crops"]:
        for channel in ("y", "rgb"):
            for name, metric in (("psnr", psnr), ("ssim", ssim)):
                value = metric(prediction, reference, crop, channel)
                computed[f"{name}_crop{crop}_{channel}"] = torch.tensor(value, dtype=torch.float64)
    image = case.input("hr")
    for scale in (2, 3, 4):
        computed[f"lr_x{scale}"] = bicubic_resize(image, 1 / scale)
    computed["up_x2"] = bicubic_resize(computed["lr_x4"], 2)
    return computed
