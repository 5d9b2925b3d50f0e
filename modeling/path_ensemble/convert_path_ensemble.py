"""Weights of plain vision transformers: there is no official code, and the method adds nothing but `ensemble_scale`."""

from dataclasses import fields

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict

from .configuration_path_ensemble import PathEnsembleConfig
from .modeling_path_ensemble import PathEnsembleForImageClassification
from .timm import state_from_timm


#: constructor argument of timm's VisionTransformer -> field of the configuration
_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "init_values": "layer_scale_init_value",
    "qkv_bias": "qkv_bias",
}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of a ViT or DeiT of transformers, under the names that it has in memory, or of timm's
            `VisionTransformer`; with or without `ensemble_scale`.
        config: fields of the model's configuration, for timm the arguments of its constructor (with `norm_eps`); besides,
            fields of [`PathEnsembleConfig`].
    """
    tensors = {name: official[name] for name in official if name != "ensemble_scale"}
    if "blocks.0.norm1.weight" in official:
        arguments, state = _timm_fields(official, config), state_from_timm(tensors)
    elif "vit.layernorm.weight" in official or "deit.layernorm.weight" in official:
        arguments = {
            "distillation_token": "deit.layernorm.weight" in official,
            "distillation_head": "distillation_classifier.weight" in official,
        }
        state = PathEnsembleForImageClassification.state_from_base(tensors, PathEnsembleConfig())
    else:
        raise ConversionError(
            "These are not weights of a supported vision transformer: neither vit.layernorm.weight nor "
            "deit.layernorm.weight (transformers) nor blocks.0.norm1.weight (timm) exists."
        )
    config.leave("library")
    known = {field.name for field in fields(PathEnsembleConfig)} | {"num_labels"}
    family_config = PathEnsembleConfig(
        **{**arguments, **{name: config[name] for name in config if name in known}},
        distillation_temperature=config.get("temperature", 1.0),
    )
    if family_config.ensemble_scale is not None:
        width = family_config.hidden_size if family_config.ensemble_scale == "channel" else 1
        state["vit.ensemble_scale"] = (
            official["ensemble_scale"]
            if "ensemble_scale" in official
            else torch.full((family_config.num_paths, width), float(family_config.ensemble_scale_init_value))
        )
    return Converted(PathEnsembleForImageClassification, family_config, state)


def _timm_fields(official: StateDict, config: dict) -> dict:
    pooling = config.get("global_pool", "token")
    if pooling not in ("token", "avg"):
        raise ConversionError(f"global_pool={pooling!r} is not supported; 'token' and 'avg' are.")
    config.agree(mlp_ratio=official["blocks.0.mlp.fc1.weight"].shape[0] / official["blocks.0.norm1.weight"].shape[0])
    arguments = {ours: config[theirs] for theirs, ours in _TIMM_ARGUMENTS.items() if theirs in config}
    return {
        "layer_norm_eps": 1e-6,
        **arguments,
        **(published_labels(config["num_classes"]) if "num_classes" in config else {}),
        "intermediate_size": official["blocks.0.mlp.fc1.weight"].shape[0],
        "pooling": "mean" if pooling == "avg" else "token",
        "norm_after_pooling": "fc_norm.weight" in official,
        "distillation_token": "dist_token" in official,
        "distillation_head": "head_dist.weight" in official,
    }
