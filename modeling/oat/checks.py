"""Checks of the inputs of users; each error says which value is wrong and how to fix it."""

import torch
from transformers.utils import is_torchdynamo_compiling

from .configuration_oat import OATConfig


def check_scenes(
    config: OATConfig,
    pixel_values: torch.Tensor | None,
    target_index: torch.Tensor | None,
    object_positions: torch.Tensor | None,
    object_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Check a batch of scenes.

    Returns:
        The positions of the objects `(batch, objects, 2)`, which are those of the grid if none are given.

    Raises:
        ValueError: if something is missing, shapes differ, or a target, row or column is out of range.
    """
    if pixel_values is None or target_index is None:
        raise ValueError("You have to specify pixel_values and target_index, or encoder_outputs.")
    if pixel_values.ndim != 5 or pixel_values.shape[2] != config.num_channels:
        raise ValueError(
            f"pixel_values must be (batch, objects, {config.num_channels}, height, width), got shape "
            f"{tuple(pixel_values.shape)}."
        )
    batch_size, num_objects, _, *size = pixel_values.shape
    if not config.pyramid_levels and tuple(size) != (config.crop_height, config.crop_width):
        raise ValueError(
            f"The images of the objects are {size[0]} x {size[1]}; this model takes {config.crop_height} x "
            f"{config.crop_width}. Resize them, with OATImageProcessor for example, or use a model with pyramid_levels."
        )
    if min(size) < config.smallest_crop:
        raise ValueError(
            f"The images of the objects are {size[0]} x {size[1]}, but at least {config.smallest_crop} x "
            f"{config.smallest_crop} are needed."
        )
    if num_objects < 1:
        raise ValueError("A scene needs at least one object.")
    if config.scanpath_head == "linear" and num_objects != config.num_objects:
        raise ValueError(
            f"This model has classes for {config.num_objects} objects (scanpath_head='linear'), but the scenes have "
            f"{num_objects}."
        )
    if target_index.shape != (batch_size,):
        raise ValueError(
            f"target_index must have the shape ({batch_size},), one target per scene, got {tuple(target_index.shape)}."
        )
    if object_mask is not None and object_mask.shape != (batch_size, num_objects):
        raise ValueError(
            f"object_mask must have the shape ({batch_size}, {num_objects}), got {tuple(object_mask.shape)}."
        )
    if object_positions is None:
        if num_objects != config.num_objects:
            raise ValueError(
                f"The scenes have {num_objects} objects, but the grid of the configuration has {config.num_rows} x "
                f"{config.num_columns}. Pass object_positions of shape (batch, objects, 2) with row and column."
            )
        index = torch.arange(num_objects, device=pixel_values.device)
        grid = torch.stack([index // config.num_columns, index % config.num_columns], dim=-1)
        object_positions = grid.expand(batch_size, -1, -1)
    elif object_positions.shape != (batch_size, num_objects, 2):
        raise ValueError(
            f"object_positions must have the shape ({batch_size}, {num_objects}, 2), with row and column of each "
            f"object, got {tuple(object_positions.shape)}."
        )
    if not is_torchdynamo_compiling() and pixel_values.device.type != "meta":
        _check_values(config, num_objects, target_index, object_positions, object_mask)
    return object_positions


def _check_values(config, num_objects, target_index, object_positions, object_mask) -> None:
    outside = (target_index < 0) | (target_index >= num_objects)
    if outside.any():
        raise ValueError(
            f"target_index {target_index[outside][0].item()} is out of range: the scenes have {num_objects} objects, "
            "counted from 0."
        )
    if object_mask is not None:
        absent = ~object_mask.bool().take_along_dim(target_index.view(-1, 1), dim=1).squeeze(1)
        if absent.any():
            raise ValueError(f"The target {target_index[absent][0].item()} of a scene is masked out by object_mask.")
    limit, _ = config.position_table_shape
    if object_positions.min() < 0 or object_positions.max() >= limit:
        raise ValueError(
            f"object_positions contain rows or columns from {object_positions.min().item()} to "
            f"{object_positions.max().item()}, but the position table of this model covers 0 to {limit - 1} "
            "(num_positions)."
        )


def check_labels(labels: torch.Tensor, num_objects: int, token_mask: torch.Tensor | None) -> None:
    """Check that labels are objects of the scene, EOS or -100.

    Raises:
        ValueError: naming the first label that is not.
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must have the shape (batch, length), got {tuple(labels.shape)}.")
    if is_torchdynamo_compiling() or labels.device.type == "meta":
        return
    wrong = (labels != -100) & ((labels < 0) | (labels > num_objects))
    if not wrong.any() and token_mask is not None:
        present = token_mask.repeat_interleave(labels.shape[0] // token_mask.shape[0], dim=0)
        wrong = (labels != -100) & ~present.take_along_dim(labels.clamp(min=0), dim=1)
    if wrong.any():
        raise ValueError(
            f"Label {labels[wrong][0].item()} is not an object of its scene. Labels must be objects of the scene (0 "
            f"to {num_objects - 1}), EOS ({num_objects}) or -100 for padding."
        )
