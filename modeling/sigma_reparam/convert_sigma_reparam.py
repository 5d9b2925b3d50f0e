"""State dicts of the official code: its PyTorch vision transformers and layers, and its Flax speech block."""

import re

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.patching.sigma_reparam import SigmaReparamConv2d, SigmaReparamLinear

from .configuration_sigma_reparam import SigmaReparamViTConfig
from .modeling_sigma_reparam import SigmaReparamViTForImageClassification
from .speech import PROJECTION_GROUPS, SigmaReparamSpeechBlock


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see :func:`hf_attn.checkpoints.official.from_official`.

    Args:
        official: official names.
        config: arguments of timm's `VisionTransformer` (`img_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`,
            `mlp_ratio`, `num_classes`, `class_token`, `global_pool`), of `SNLinear` or `SNConv2d`, or of `SpeechTransformerBlock`.
    """
    if "patch_embed.proj.weight" in official:
        return _convert_vit(official, config)
    if "params.wf.kernel" in official:
        return _convert_speech_block(official, config)
    if "weight" in official:
        return _convert_layer(official, config)
    raise ConversionError(
        "This is no official layout of sigma-reparam: neither a vision transformer (patch_embed.proj.weight), nor a layer (weight), nor "
        "a Flax speech block (params.wf.kernel)."
    )


def _is_duplicate(name: str) -> bool:
    # A second name of the weight, and two tracking buffers of which one is overwritten by gamma.
    return name.endswith(
        ("spectral_normed_weight.weight", "spectral_normed_weight.spectral_norm", "effective_spectral_norm")
    )


def _rename_layer(name: str) -> str:
    return re.sub(r"sigma$", "gamma", name.replace("spectral_normed_weight.u", "u"))


# --- vision ----------------------------------------------------------------------------------------------------------


_VIT_NAMES = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"vit.layers.\1.attention.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
    (r"^head\.", "classifier."),
)


def _convert_vit(official: StateDict, arguments: dict) -> Converted:
    pooling = arguments.get("global_pool", "token")
    if pooling not in ("token", "avg"):
        raise ConversionError(f"global_pool={pooling!r} is not served; 'token' and 'avg' are.")
    config = SigmaReparamViTConfig(
        image_size=arguments["img_size"],
        use_class_token="cls_token" in official,
        pooling="mean" if pooling == "avg" else "token",
        patch_size=arguments["patch_size"],
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=int(arguments["embed_dim"] * arguments.get("mlp_ratio", 4.0)),
        num_channels=arguments.get("in_chans", 3),
        qkv_bias=arguments.get("qkv_bias", True),
        **published_labels(arguments["num_classes"]),
    )
    arguments.agree(class_token="cls_token" in official)
    state, dropped = {}, []
    for name in official:
        if _is_duplicate(name):
            dropped.append(name)
            continue
        for pattern, replacement in _VIT_NAMES:
            if re.match(pattern, name):
                state[_rename_layer(re.sub(pattern, replacement, name))] = official[name]
                break
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    patch = config.patch_size
    size = (patch, patch) if isinstance(patch, int) else tuple(patch)
    state[kernel] = state[kernel].unflatten(1, (config.num_channels, *size))
    return Converted(SigmaReparamViTForImageClassification, config, state, tuple(dropped))


def _convert_layer(official: StateDict, arguments: dict) -> Converted:
    state = {_rename_layer(name): official[name] for name in official if not _is_duplicate(name)}
    dropped = tuple(name for name in official if _is_duplicate(name))
    arguments.leave("init_multiplier")
    keywords = {key: arguments[key] for key in arguments if key != "init_multiplier"}
    if "kernel_size" not in keywords:
        return Converted(SigmaReparamLinear, keywords, state, dropped)
    size = keywords["kernel_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    state["weight"] = state["weight"].unflatten(1, (-1, *size))
    return Converted(SigmaReparamConv2d, keywords, state, dropped)


# --- speech ----------------------------------------------------------------------------------------------------------


_SPEECH_MODULES = {
    "wf": "o_proj",
    "w1": "fc1",
    "w2": "fc2",
    "ln1": "attention_norm",
    "ln2": "mlp_norm",
    **{f"w{name}": f"projections.{name}" for names in PROJECTION_GROUPS.values() for name in names},
}
_SPEECH_TENSORS = {"kernel": "weight", "scale": "weight", "bias": "bias", "sigma": "gamma"}


def speech_name(name: str) -> str | None:
    """Our name of an official tensor of the speech block; none for the trackers that have no place."""
    if name == "params.attn":
        return "attention_shift"
    collection, module, tensor = name.split(".")
    if module not in _SPEECH_MODULES:
        return None
    if collection == "spectral":
        return f"{_SPEECH_MODULES[module]}.u" if tensor == "u" else None
    return f"{_SPEECH_MODULES[module]}.{_SPEECH_TENSORS[tensor]}"


def _convert_speech_block(official: StateDict, arguments: dict) -> Converted:
    state, dropped = {}, []
    for name in official:
        ours = speech_name(name)
        if name.startswith("spectral.") and ours is None:
            dropped.append(name)
        elif ours is not None:
            tensor = official[name]
            state[ours] = tensor.T.contiguous() if name.endswith(".kernel") else tensor
    arguments.leave("std_init")
    kind = arguments.get("ln_norm_type", "post")
    config = {
        "hidden_size": arguments["emb_dim"],
        "intermediate_size": arguments["mlp_dim"],
        "num_attention_heads": arguments["num_heads"],
        "norm": next((norm for norm in ("post", "pre") if norm in kind), "none"),
        "reparametrised": "spectral" in kind,
        "projection_groups": arguments.get("disjoint_type", 0),
        "use_bias": arguments.get("bias", False),
        "dropout": arguments.get("dropout", 0.0),
        "layer_dropout": arguments.get("layer_dropout", 0.0),
    }
    return Converted(SigmaReparamSpeechBlock, config, state, tuple(dropped))


def to_official(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Shape of one of our tensors (a weight or its gradient) under its official name."""
    if name.endswith(".kernel"):
        return tensor.T
    return tensor.flatten(1) if tensor.ndim == 4 else tensor
