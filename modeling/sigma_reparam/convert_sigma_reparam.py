"""State dicts of the official code: its PyTorch vision transformers and layers, and its Flax speech block."""

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming
from hf_attn.patching.sigma_reparam import SigmaReparamConv2d, SigmaReparamLinear

from .configuration_sigma_reparam import SigmaReparamViTConfig
from .modeling_sigma_reparam import SigmaReparamViTForImageClassification
from .speech import SigmaReparamSpeechBlock


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

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
        "This is not an official layout of sigma-reparam: neither a vision transformer (patch_embed.proj.weight), nor "
        "a layer (weight), nor a Flax speech block (params.wf.kernel)."
    )


#: names in a layer; dropped are a second name of the weight, and two tracking buffers of which one is overwritten by gamma
_LAYER = (
    (r"(spectral_normed_weight\.(weight|spectral_norm)|effective_spectral_norm)$", None),
    (r"(^|\.)spectral_normed_weight\.u$", r"\1u"),
    (r"(^|\.)sigma$", r"\1gamma"),
    (r"(^|\.)(weight|bias)$", r"\1\2"),
)
_VIT = Renaming(
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"vit.layers.\1.attention.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
    (r"^head\.", "classifier."),
    *_LAYER,
)
_PLAIN_LAYER = Renaming(*_LAYER)


def _convert_vit(official: StateDict, arguments: dict) -> Converted:
    pooling = arguments.get("global_pool", "token")
    if pooling not in ("token", "avg"):
        raise ConversionError(f"global_pool={pooling!r} is not supported; 'token' and 'avg' are.")
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
    state = _VIT.state_dict(official)
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    patch = config.patch_size
    size = (patch, patch) if isinstance(patch, int) else tuple(patch)
    state[kernel] = state[kernel].unflatten(1, (config.num_channels, *size))
    return Converted(SigmaReparamViTForImageClassification, config, state, _VIT.dropped(official))


def _convert_layer(official: StateDict, arguments: dict) -> Converted:
    dropped, state = _PLAIN_LAYER.dropped(official), _PLAIN_LAYER.state_dict(official)
    arguments.leave("init_multiplier")
    keywords = {key: arguments[key] for key in arguments if key != "init_multiplier"}
    if "kernel_size" not in keywords:
        return Converted(SigmaReparamLinear, keywords, state, dropped)
    size = keywords["kernel_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    state["weight"] = state["weight"].unflatten(1, (-1, *size))
    return Converted(SigmaReparamConv2d, keywords, state, dropped)


# --- speech ----------------------------------------------------------------------------------------------------------


#: dropped are the trackers that have no place
SPEECH_NAMES = Renaming(
    (r"^spectral\.\w+\.(?!u$)|^spectral\.(?!w)", None),
    (r"^params\.attn$", "attention_shift"),
    (r"^(params|spectral)\.", ""),
    (r"^wf\.", "o_proj."),
    (r"^w([12])\.", r"fc\1."),
    (r"^ln1\.", "attention_norm."),
    (r"^ln2\.", "mlp_norm."),
    (r"^w([a-z]+)\.", r"projections.\1."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.sigma$", ".gamma"),
)


def _convert_speech_block(official: StateDict, arguments: dict) -> Converted:
    state = {
        # Flax's kernels are (in, out)
        name: tensor.T.contiguous() if name.endswith(".weight") and tensor.ndim == 2 else tensor
        for name, tensor in SPEECH_NAMES.state_dict(official).items()
    }
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
    return Converted(SigmaReparamSpeechBlock, config, state, SPEECH_NAMES.dropped(official))


def to_official(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Shape of one of our tensors (a weight or its gradient) under its official name."""
    if name.endswith(".kernel"):
        return tensor.T
    return tensor.flatten(1) if tensor.ndim == 4 else tensor
