"""What the official checkpoints of image-restoration families have in common (BasicSR's layout)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.official import ConversionError, StateDict


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

#: official modules of the shell -> ours below the head; `{}` is the base model's name
SHELL = {
    r"conv_first": "{}.first_convolution",
    r"patch_embed\.norm": "{}.embeddings.layernorm",
    r"norm": "{}.layernorm",
    r"conv_after_body": "{}.conv_after_body",
    r"conv_before_upsample\.0": "reconstruction.conv_before_upsample",
    r"conv_last": "reconstruction.final_convolution",
}


def checkpoint_weights(official: StateDict) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights in a checkpoint, and the top-level keys that are left aside.

    BasicSR saves `params` and, if it kept an average, `params_ema`, which is the one that the papers test.
    """
    for name in ("params_ema", "params"):
        if name in official:
            weights = official[name]
            if not isinstance(weights, Mapping):
                raise ConversionError(f"{name!r} holds a {type(weights).__name__}, not a dictionary of tensors.")
            return dict(weights), tuple(key for key in official if key != name)
    return {name: official[name] for name in official}, ()


def rename(
    weights: Mapping[str, torch.Tensor], modules: dict[str, str], dropped: str, prefix: str, slug: str
) -> dict[str, torch.Tensor]:
    r"""Rename official keys.

    Args:
        weights: official names -> tensors.
        modules: regular expression of an official module -> our name, in which `\1`... are its groups.
        dropped: regular expression of the official buffers that are recomputed.
        prefix: name of the base model in the head.
        slug: the paper, for error messages.

    Raises:
        ConversionError: naming the keys that no rule knows.
    """
    rules = [(re.compile(pattern), name.replace("{}", prefix)) for pattern, name in (SHELL | modules).items()]
    state, unknown = {}, []
    for key, tensor in weights.items():
        if re.fullmatch(dropped, key):
            continue
        if key == "absolute_pos_embed":
            state[f"{prefix}.embeddings.position_embeddings"] = tensor
            continue
        if match := re.fullmatch(r"upsample\.(\d+)\.(weight|bias)", key):
            state[f"reconstruction.convolutions.{int(match[1]) // 2}.{match[2]}"] = tensor
            continue
        module, _, parameter = key.rpartition(".")
        for pattern, name in rules:
            if (match := pattern.fullmatch(module)) and parameter in (
                "weight",
                "bias",
                "relative_position_bias_table",
            ):
                state[f"{match.expand(name)}.{parameter}"] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        more = f" and {len(unknown) - 12} more" if len(unknown) > 12 else ""
        raise ConversionError(
            f"The checkpoint has keys that {slug} does not know: {', '.join(sorted(unknown)[:12])}{more}."
        )
    return state


def shape_of(weights: Mapping[str, torch.Tensor], key: str, slug: str) -> torch.Size:
    """Shape of a tensor that every checkpoint of the family has."""
    if key not in weights:
        raise ConversionError(f"This is no checkpoint of {slug}: it has no {key!r}.")
    return weights[key].shape


def shell_fields(weights: Mapping[str, torch.Tensor], slug: str) -> dict[str, Any]:
    """The fields of the shell that follow from the shapes of the weights."""
    embed_dim, num_channels = shape_of(weights, "conv_first.weight", slug)[:2]
    shape_of(weights, "conv_last.weight", slug)
    upscale = 1
    for key, tensor in weights.items():
        if re.fullmatch(r"upsample\.\d+\.weight", key):
            upscale *= math.isqrt(tensor.shape[0] // tensor.shape[1])
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
        arguments: what the user gave.
        own: arguments of this family only -> fields.
        ignored: arguments that the official class accepts and does not use.
        inferred: what follows from the weights.
        slug: the paper, for error messages.

    Raises:
        ConversionError: for an unknown argument, another scale than the checkpoint's, or an image no larger than a
            window.
    """
    arguments = dict(arguments.get("network_g", arguments))
    names = _FIELDS | own
    unknown = sorted(set(arguments) - set(names) - {*_IGNORED, *ignored, "patch_size"})
    if unknown:
        raise ConversionError(f"{slug} has no argument {', '.join(unknown)}. Arguments: {', '.join(names)}.")
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
            f"The checkpoint is for scale {inferred['upscale']}, and upscale={fields['upscale']} was asked for."
        )
    window_size = fields.get("window_size", inferred["window_size"])
    if image_size is not None and image_size <= window_size:
        raise ConversionError(
            f"img_size={image_size} is not larger than the window of {window_size}: the official code then shrinks its "
            "windows and drops the shifts, which no published model does."
        )
    return fields
