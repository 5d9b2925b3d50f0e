"""How much memory the restoration of an image takes, and which tile fits a budget."""

import re

import torch
from transformers import PreTrainedModel


#: allocators, workspaces of convolutions and matrix products, and terms that the formulas below omit
_MARGIN = 1.3
#: what libraries keep for themselves once they have run
_WORKSPACE = 64 * 2**20
#: Most of what holes in the heap take. Widths that grow from block to block leave holes, until buffers are so large (32 MiB
#: in glibc) that each has memory of its own.
_MOST_HOLES = 320 * 10**6
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_memory(size: str | int) -> int:
    """Bytes of `"2GB"`, `"500 MiB"` or a number.

    Raises:
        ValueError: if it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(size).upper())
    if match is None or (number := float(match[1]) * _UNITS[match[2] or ""]) <= 0:
        raise ValueError(
            f"A memory size must be a number of bytes or a string such as '2GB' or '500MiB', got {size!r}."
        )
    return int(number)


def activation_bytes_per_pixel(model: PreTrainedModel) -> float:
    """Peak of the activations of a forward without gradients, for each (padded) pixel of the input.

    It is the larger of the peaks in an attention module and in the reconstruction. Supports HAT, DRCT and Swin2SR.
    """
    config = model.config
    width = max(config.block_dims()) if hasattr(config, "block_dims") else config.embed_dim
    window = config.window_size
    key_ratio = (getattr(config, "overlap_window_size", window) / window) ** 2
    # Features of the long skip and of the group; norm, branches, windows, q, k, v and the output of attention.
    body = 2 * config.embed_dim + width * (9 + (2 * key_ratio if key_ratio > 1 else 0))
    if config._attn_implementation not in ("sdpa", "flex_attention"):
        # Logits, their sum with the bias, and weights.
        body += 3 * max(config.num_heads) * window**2 * key_ratio
    scale = config.upscale
    # The last pixel shuffle, the output and the input of its convolution, and the image.
    head = 2 * config.embed_dim + 64 * (2 * scale**2 + scale**2 / (9 if scale == 3 else 4)) + 12 * scale**2
    size = torch.finfo(model.dtype).bits / 8
    if size < 4:
        # Workspaces of half-precision kernels are in float32.
        size *= 1.4
    return _MARGIN * size * max(body, head)


def activation_bytes(model: PreTrainedModel, pixels: int) -> float:
    """Peak of the activations of a forward without gradients on so many (padded) pixels, holes in the heap included."""
    activations = activation_bytes_per_pixel(model) * pixels
    widths = model.config.block_dims() if hasattr(model.config, "block_dims") else ()
    return activations + (min(activations, _MOST_HOLES) if len(set(widths)) > 1 else 0)


def available_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def fixed_bytes(model: PreTrainedModel, height: int, width: int, channels: int, bytes_per_value: int) -> int:
    """Memory that does not depend on the tile: weights, the image, the result and its copy as a Pillow image."""
    scale = model.config.upscale
    pixels = height * width
    # Pillow keeps RGB in four bytes.
    result = scale**2 * pixels * (channels * bytes_per_value + (4 if bytes_per_value == 1 else 0))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return int(_WORKSPACE + weights + pixels * channels * bytes_per_value * 2 + result)


def largest_tile(
    model: PreTrainedModel,
    height: int,
    width: int,
    channels: int,
    bytes_per_value: int,
    budget: int,
    overlap: int,
    blend: str,
    batch_size: int,
) -> int | None:
    """The largest tile, a multiple of the window, with which an image fits a budget; None if the whole image fits.

    Raises:
        ValueError: if not even the smallest tile fits; the message gives the memory that it needs.
    """
    window, scale = model.config.window_size, model.config.upscale
    fixed = fixed_bytes(model, height, width, channels, bytes_per_value)

    def needed(tile: int, extended: int) -> float:
        # Rows of the result as floating numbers, twice while they are joined.
        band = 2 * 4 * max(channels, 3) * scale**2 * min(extended, height) * width
        pixels = batch_size * min(extended, height + window) * min(extended, width + window)
        return fixed + band + activation_bytes(model, pixels)

    def extended(tile: int) -> int:
        return tile + 2 * overlap if blend == "cut" else tile

    longest = max(height, width)
    if needed(longest, longest) <= budget:
        return None
    smallest = window if blend == "cut" else (overlap // window + 1) * window
    if (least := needed(smallest, extended(smallest))) > budget:
        raise ValueError(
            f"An image of {height}x{width} does not fit into {budget / 1e9:.2f} GB: with the smallest tile, "
            f"{smallest}, it takes about {least / 1e9:.2f} GB. Allow more memory, or reduce batch_size and "
            "tile_overlap."
        )
    tile = smallest
    while needed(tile + window, extended(tile + window)) <= budget:
        tile += window
    return tile
