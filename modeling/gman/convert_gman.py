"""Weights of the official TensorFlow graph, by the names of its layers, and of torch-geometric-temporal's GMAN."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_gman import GMANConfig
from .graph import read_spatial_embedding
from .modeling_gman import GMANForPrediction


#: names of the TensorFlow layers -> ours, applied in order
_OFFICIAL = (
    (r"^input\.", "gman.input_projection."),
    (r"^ste\.se\.", "gman.embeddings.spatial."),
    (r"^ste\.te\.", "gman.embeddings.temporal."),
    (r"^transform\.", "gman.transform_attention."),
    (r"^(encoder|decoder)\.", r"gman.\1."),
    (r"\.(spatial|temporal)\.([qkv]|out)\.", r".\1_attention.\2."),
    (r"^output\.", "head."),
    (r"\.fusion\.s\.", ".fusion.spatial."),
    (r"\.fusion\.t\.", ".fusion.temporal."),
    (r"\.out\.([01])\.", r".output.\1."),
)
#: names of torch-geometric-temporal -> ours
_PORT = (
    (r"^_st_embedding\._fully_connected_se\.", "gman.embeddings.spatial."),
    (r"^_st_embedding\._fully_connected_te\.", "gman.embeddings.temporal."),
    (r"^_st_att_block1\.", "gman.encoder."),
    (r"^_st_att_block2\.", "gman.decoder."),
    (r"^_transform_attention\.", "gman.transform_attention."),
    (r"^_fully_connected_1\.", "gman.input_projection."),
    (r"^_fully_connected_2\.", "head."),
    (r"\._(spatial|temporal)_attention\.", r".\1_attention."),
    (r"\._gated_fusion\._fully_connected_xs\.", ".fusion.spatial."),
    (r"\._gated_fusion\._fully_connected_xt\.", ".fusion.temporal."),
    (r"\._gated_fusion\._fully_connected_h\.", ".fusion.output."),
    (r"\._fully_connected_([qkv])\.", r".\1."),
    (r"\._fully_connected\.", ".output."),
    (r"\._batch_norm\.", ".bn."),
    (r"\._conv2d\.", "."),
    (r"\.(q|k|v|fusion\.spatial|fusion\.temporal)\._conv2ds\.0\.", r".\1."),
    (r"\._conv2ds\.", "."),
)
_BOTH = (
    (r"\.([01])\.bn\.", lambda match: f".norm{int(match[1]) + 1}."),
    (r"\.([01])\.(weight|bias)$", lambda match: f".fc{int(match[1]) + 1}.{match[2]}"),
    (r"\.(q|k|v|fusion\.spatial|fusion\.temporal)\.bn\.", r".\1_norm."),
    (r"\.(q|k|v|fusion\.spatial|fusion\.temporal)\.(weight|bias)$", r".\1_proj.\2"),
)
FROM_OFFICIAL = Renaming((r"^spatial_embedding$", "gman.embeddings.spatial_embedding"), *_OFFICIAL, *_BOTH)
_FROM_PORT = Renaming((r"^spatial_embedding$", "gman.embeddings.spatial_embedding"), *_PORT, *_BOTH)


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert either layout; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: weights `(out, in)` under the names of the card of the layers (`encoder.0.spatial.q.weight`...), or those of
            torch-geometric-temporal (`_st_att_block1.0...`). They may hold `spatial_embedding`.
        config: of the TensorFlow graph `history_steps`, `prediction_steps`, `steps_per_day`, `num_heads`, `head_dim`,
            `causal`, `batch_norm_eps`, `value_mean`, `value_std`; of the port its constructor arguments. For both,
            `spatial_embedding`, which the networks take as an input: the path of a file or an array `(nodes, width)`.
    """
    port = any(name.startswith("_st_embedding.") for name in official)
    state = (_FROM_PORT if port else FROM_OFFICIAL).state_dict(official)
    if port:
        state = {name: tensor.squeeze((2, 3)) if tensor.ndim == 4 else tensor for name, tensor in state.items()}
    for name in [name for name in state if name.endswith(".running_mean")]:
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))

    embedding = state.get("gman.embeddings.spatial_embedding", config.get("spatial_embedding"))
    if embedding is None:
        raise ConversionError(
            "The weights of GMAN do not contain the sensor embeddings, which are an input of the network. Pass "
            "`spatial_embedding` in `config`: the path of the SE file, or an array (nodes, width)."
        )
    if isinstance(embedding, str | Path):
        embedding = read_spatial_embedding(embedding)
    embedding = torch.as_tensor(embedding, dtype=torch.float32)
    if embedding.ndim != 2:
        raise ConversionError(f"spatial_embedding must have the shape (nodes, width), got {tuple(embedding.shape)}.")
    state["gman.embeddings.spatial_embedding"] = embedding
    shapes = _shapes(state)
    blocks = {"L" if port else "num_blocks": shapes["num_hidden_layers"]}
    config.agree(num_nodes=shapes["num_nodes"], steps_per_day=shapes["steps_per_day"], **blocks)
    # Setting of the training step in the golden cases.
    config.leave("train_mode_bn_decay")
    fields = _port_fields(config) if port else _official_fields(config)
    return Converted(GMANForPrediction, GMANConfig(**fields, **shapes), state)


def _official_fields(config: Mapping) -> dict:
    optional = {
        name: config[name]
        for name in (
            "causal",
            "batch_norm_eps",
            "value_mean",
            "value_std",
            "output_dropout",
            "null_value",
            "sensor_ids",
        )
        if name in config
    }
    return {
        "context_length": config["history_steps"],
        "prediction_length": config["prediction_steps"],
        "num_attention_heads": config["num_heads"],
        "head_dim": config["head_dim"],
        **optional,
    }


def _port_fields(config: Mapping) -> dict:
    # `torch.split(x, K)` makes d heads of width K, and the scale stays that of d.
    return {
        "context_length": config["num_his"],
        "prediction_length": config["num_pred"],
        "num_attention_heads": config["d"],
        "head_dim": config["K"],
        "attention_scaling": config["d"] ** -0.5,
        "causal": config["mask"],
        "embedding_bias": config.get("use_bias", True),
        "batch_norm_momentum": config.get("bn_decay", 0.1),
        "batch_norm_everywhere": True,
        "batch_norm_eps": 1e-5,
        "attention_output_layers": 1,
        "wrap_time_features": True,
        **{name: config[name] for name in ("value_mean", "value_std", "null_value", "sensor_ids") if name in config},
    }


def _shapes(state: Mapping[str, torch.Tensor]) -> dict:
    """Fields that follow from the shapes of the weights."""
    temporal = "gman.embeddings.temporal.fc1.weight"
    if temporal not in state:
        raise ConversionError(f"This is not a GMAN checkpoint: no tensor corresponds to {temporal}.")
    layers = [int(match[1]) for name in state if (match := re.match(r"gman\.encoder\.(\d+)\.", name))]
    nodes, width = state["gman.embeddings.spatial_embedding"].shape
    return {
        "num_nodes": nodes,
        "spatial_embedding_dim": width,
        "steps_per_day": state[temporal].shape[1] - 7,
        "num_hidden_layers": 1 + max(layers, default=0),
    }
