"""Conversion of official checkpoints, shared by the families for image restoration (BasicSR's layout)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.official import ConversionError
from ...checkpoints.renaming import Renaming, Rule


#: official arguments of all the families -> configuration fields
_FIELDS = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "hidden_dropout_prob",
    "attn_drop_rate": "attention_probs_dropout_prob",
    "drop_path_rate": "drop_path_rate",
    "ape": "use_absolute_embeddings",
    "patch_norm": "patch_norm",
    "upscale": "upscale",
    "img_range": "img_range",
    "upsampler": "upsampler",
    "resi_connection": "resi_connection",
}
#: official arguments without a meaning for the result
_IGNORED = ("type", "use_checkpoint", "norm_layer")

#: official names of the shell -> ours, without the name of the base model
_SHELL = (
    (r"^conv_last\.", "reconstruction.final_convolution."),
    (r"^conv_before_upsample\.0\.", "reconstruction.conv_before_upsample."),
    (r"^upsample\.(\d+)\.", lambda match: f"reconstruction.convolutions.{int(match[1]) // 2}."),
    (r"^conv_first\.", "first_convolution."),
    (r"^absolute_pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.norm\.", "embeddings.layernorm."),
    (r"^norm\.", "layernorm."),
    (r"^conv_after_body\.", "conv_after_body."),
)


def renaming(prefix: str, *rules: Rule) -> Renaming:
    """Names of a family's official checkpoints -> ours.

    Args:
        prefix: name of the base model in the head.
        rules: the rules for `layers`, whose results begin with `groups`.
    """
    base_model = (r"^(first_convolution|embeddings|layernorm|conv_after_body|groups)\b", rf"{prefix}.\1")
    return Renaming(*rules, *_SHELL, base_model)


def shape_of(weights: Mapping[str, torch.Tensor], key: str, slug: str) -> torch.Size:
    """Shape of a tensor that every checkpoint of the family has."""
    if key not in weights:
        raise ConversionError(f"This is not a checkpoint of {slug}: it has no {key!r}.")
    return weights[key].shape


def shell_fields(weights: Mapping[str, torch.Tensor], slug: str) -> dict[str, Any]:
    """The fields of the shell that follow from the shapes of the weights."""
    embed_dim, num_channels = shape_of(weights, "conv_first.weight", slug)[:2]
    shape_of(weights, "conv_last.weight", slug)
    upscale = 1
    # Not `weights.items()`: a tensor that has been read counts as known.
    for key in weights:
        if re.fullmatch(r"upsample\.\d+\.weight", key):
            out_channels, in_channels = weights[key].shape[:2]
            upscale *= math.isqrt(out_channels // in_channels)
    fields = {
        "embed_dim": embed_dim,
        "num_channels": num_channels,
        "upscale": upscale,
        "patch_norm": "patch_embed.norm.weight" in weights,
        "use_absolute_embeddings": "absolute_pos_embed" in weights,
        "resi_connection": "1conv" if "conv_after_body.weight" in weights else "identity",
    }
    if fields["use_absolute_embeddings"]:
        fields["image_size"] = math.isqrt(weights["absolute_pos_embed"].shape[1])
    return fields


def given_fields(
    arguments: Mapping[str, Any], own: dict[str, str], ignored: tuple[str, ...], inferred: dict[str, Any], slug: str
) -> dict[str, Any]:
    """Official constructor arguments (or the `network_g` of a configuration file) as configuration fields.

    Args:
        arguments: the arguments given by the user.
        own: arguments of this family only -> fields.
        ignored: arguments that the official class accepts and does not use.
        inferred: the fields inferred from the weights.
        slug: the paper, for error messages.

    Raises:
        ConversionError: for an unknown argument, another scale than the checkpoint's, or an image no larger than a
            window.
    """
    arguments = dict(arguments.get("network_g", arguments))
    names = _FIELDS | own
    unknown = sorted(set(arguments) - set(names) - {*_IGNORED, *ignored, "patch_size"})
    if unknown:
        raise ConversionError(
            f"{slug} does not have the arguments {', '.join(unknown)}. Arguments: {', '.join(names)}."
        )
    if arguments.get("patch_size", 1) != 1:
        raise ConversionError(f"patch_size must be 1 (a token is a pixel), got {arguments['patch_size']}.")
    fields = {names[name]: value for name, value in arguments.items() if name in names}
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = list(value)
    image_size = fields.get("image_size")
    if isinstance(image_size, list):
        if len(set(image_size)) != 1:
            raise ConversionError(f"img_size must be square, got {tuple(image_size)}.")
        image_size = fields["image_size"] = image_size[0]
    if fields.get("upscale", inferred["upscale"]) != inferred["upscale"]:
        raise ConversionError(
            f"The checkpoint is for scale {inferred['upscale']}, but upscale={fields['upscale']} was requested."
        )
    window_size = fields.get("window_size", inferred["window_size"])
    if image_size is not None and image_size <= window_size:
        raise ConversionError(
            f"img_size={image_size} is not larger than the window of {window_size}: the official code then shrinks its "
            "windows and drops the shifts, which no published model does."
        )
    return fields
