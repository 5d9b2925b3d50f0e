"""Checkpoints of the official code: classifiers (`models/biformer*.py`) and backbones for dense prediction."""

import re

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_biformer import NUM_FULL_ATTENTION_HEADS, BiFormerConfig
from .modeling_biformer import (
    BiFormerBackbone,
    BiFormerForImageClassification,
    BiFormerFullAttention,
    BiFormerRoutingAttention,
)


#: official names in an attention module -> ours
_ATTENTION_NAMES = (
    (r"(^|\.)(qkv\.qkv|qkv_linear|qkv)\.", r"\1qkv."),
    (r"(^|\.)(wo|output_linear|proj)\.", r"\1proj."),
    (r"(^|\.)router\.emb\.", r"\1router.linear."),
    (r"(^|\.)lepe\.", r"\1lepe."),
)
_ATTENTION_MODULE = Renaming(*_ATTENTION_NAMES)
_MODEL = Renaming(
    (r"^norm\.", "biformer.norm."),
    (r"^head\.", "classifier."),
    (r"^extra_norms\.(\d+)\.", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}."),
    (r"^downsample_layers\.0\.", "biformer.embeddings."),
    (r"^downsample_layers\.(\d+)\.", r"biformer.encoder.stages.\1.downsampling."),
    (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.", r"biformer.encoder.stages.\1.layers.\2."),
    (r"\.gamma1$", ".attention_scale"),
    (r"\.gamma2$", ".mlp_scale"),
    (r"\.pos_embed\.", ".position_conv."),
    (r"\.attn\.", ".attention."),
    (r"\.attention\.1\.", ".attention.fc1."),
    (r"\.attention\.2\.", ".attention.depthwise_conv."),
    (r"\.attention\.3\.", ".attention.fc2."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", ".mlp.depthwise_conv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    *_ATTENTION_NAMES,
)
#: linear layers, which are 1x1 convolutions in some of the official code
_LINEAR = ("qkv", "proj", "fc1", "fc2")
#: the projection to queries, keys and values of an attention module by itself
_ATTENTION = ("qkv.qkv.weight", "qkv_linear.weight", "qkv.weight")
#: constructor arguments that would change the function -> the supported value
_REFUSED = {
    "qk_scale": (None,),
    "pe": (None,),
    "param_attention": ("qkvo",),
    "drop_rate": (0, 0.0),
    "kv_downsample_kernel": (None,),
}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: official state dict, or a training checkpoint that holds it under `model`. With `extra_norms` it is that
            of a backbone for dense prediction. Or that of one attention module: `BiLevelRoutingAttention`, `nchwBRA`, or
            the full attention of the last stage.
        config: constructor arguments of `BiFormer`, `BiFormerSTL` or `nchwBiFormerSTL`; those of the published variant with
            the same layout, depths and widths if there are none. Of an attention module: `dim`, `num_heads`, `n_win`, `topk`,
            `side_dwconv`...
    """
    if any(name in official for name in _ATTENTION):
        return _convert_attention(official, config)
    family_config = _config(official, config)
    is_backbone = "extra_norms.0.weight" in official
    state = _flatten_linear(_MODEL.state_dict(official))
    if is_backbone:
        family_config.out_features = family_config.stage_names[1:]
        state = {name.removeprefix("biformer."): tensor for name, tensor in state.items()}
    return Converted(BiFormerBackbone if is_backbone else BiFormerForImageClassification, family_config, state)


def _convert_attention(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert an attention module by itself; ours take maps whose channels are last."""
    _refuse(config)
    weight = official[next(name for name in _ATTENTION if name in official)]
    is_full, is_nchw = "qkv.weight" in official, weight.ndim == 4
    dim = config["dim"]
    qk_dim = config.get("qk_dim") or dim
    num_heads = config.get("num_heads", 8)
    topk = config.get("topk", 4)
    if is_full:
        if num_heads != NUM_FULL_ATTENTION_HEADS:
            raise ConversionError(
                f"Full attention has {NUM_FULL_ATTENTION_HEADS} heads in every BiFormer, got num_heads={num_heads}."
            )
        topk = -1 if is_nchw or "lepe.weight" not in official else -2
    side_dwconv = official["lepe.weight"].shape[-1] if "lepe.weight" in official else 0
    config.agree(side_dwconv=side_dwconv, qkv_bias=not is_full)
    config.leave("attn_backend", "attn_drop", "proj_drop")
    mode = config.get("kv_downsample_mode", "identity")
    family_config = BiFormerConfig(
        layout="stl_nchw" if is_nchw else "biformer",
        hidden_sizes=[dim],
        depths=[1],
        mlp_ratios=[1],
        n_win=[config.get("n_win", 7)],
        topks=[topk],
        head_dim=qk_dim // num_heads,
        qk_dims=[qk_dim],
        side_dwconv=side_dwconv,
        auto_pad=config.get("auto_pad", False),
        kv_pool=None if mode == "identity" else mode,
        kv_per_wins=[config.get("kv_per_win", 4)],
        kv_downsample_ratios=[config.get("kv_downsample_ratio", 4)],
        soft_routing=config.get("soft_routing", False),
        diff_routing=config.get("diff_routing", False),
        param_routing=config.get("param_routing", False),
    )
    state = _flatten_linear(_ATTENTION_MODULE.state_dict(official))
    attention_class = BiFormerFullAttention if is_full else BiFormerRoutingAttention
    return Converted(attention_class, {"config": family_config, "stage": 0}, state)


def _refuse(config: dict) -> None:
    for name, served in _REFUSED.items():
        if config.get(name, served[0]) not in served:
            raise ConversionError(f"{name}={config[name]!r} is not supported; only {served[0]!r} is.")


def _flatten_linear(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.flatten(1) if tensor.ndim == 4 and name.split(".")[-2] in _LINEAR else tensor
        for name, tensor in state.items()
    }


def _layout(official: StateDict) -> str:
    if "downsample_layers.0.3.weight" in official:
        return "biformer"
    return "stl_nchw" if official["stages.0.blocks.0.mlp.0.weight"].ndim == 4 else "stl"


def _config(official: StateDict, config: dict) -> BiFormerConfig:
    if "downsample_layers.0.0.weight" not in official:
        raise ConversionError("This is not a checkpoint of BiFormer: it has no downsample_layers.0.0.weight.")
    layout = _layout(official)
    num_labels = official["head.weight"].shape[0] if "head.weight" in official else 0
    labels = published_labels(num_labels)
    if not config:
        return BiFormerConfig.from_variant(_variant(official, layout), **labels)
    _refuse(config)

    if "extra_norms.0.weight" not in official:
        config.agree(num_classes=num_labels)
    config.leave("num_classes")
    # The norms are those of the layout; representation_size is not used by the official code.
    config.leave("norm_layer", "qk_scale", "use_checkpoint_stages", "representation_size", "pretrained")
    # Pooling is an option of the first layout, where it is on by default.
    mode = config.get("kv_downsample_mode", "ada_avgpool" if layout == "biformer" else "identity")
    return BiFormerConfig(
        layout=layout,
        num_channels=config.get("in_chans", 3),
        hidden_sizes=config["embed_dim"],
        depths=config["depth"],
        mlp_ratios=config.get("mlp_ratios", [4, 4, 4, 4]),
        n_win=config["n_wins"] if "n_wins" in config else config.get("n_win", 7),
        topks=config["topks"],
        head_dim=config["head_dim"],
        qk_dims=config.get("qk_dims"),
        side_dwconv=config.get("side_dwconv", 5),
        before_attn_dwconv=config.get("before_attn_dwconv", 3) if layout == "biformer" else 0,
        auto_pad=config.get("auto_pad", False),
        kv_pool=None if mode == "identity" else mode,
        kv_per_wins=config.get("kv_per_wins", [2, 2, -1, -1]),
        kv_downsample_ratios=config.get("kv_downsample_ratios"),
        soft_routing=config.get("soft_routing", False),
        diff_routing=config.get("diff_routing", False),
        param_routing=config.get("param_routing", False),
        pre_norm=config.get("pre_norm", True),
        mlp_dwconv=config.get("mlp_dwconv", False),
        layer_scale_init_value=config.get("layer_scale_init_value", -1),
        drop_path_rate=config.get("drop_path_rate", 0.0),
        **labels,
    )


def _variant(official: StateDict, layout: str) -> str:
    """The published variant that the weights have the layout, depths and widths of."""
    depths: dict[int, int] = {}
    for name in official:
        if match := re.match(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.", name):
            stage, layer = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), layer + 1)
    prefix = "blocks." if layout != "biformer" else ""
    widths = [official[f"stages.{stage}.{prefix}0.norm1.weight"].shape[0] for stage in sorted(depths)]
    for name in BiFormerConfig.variants:
        config = BiFormerConfig.from_variant(name)
        same_sizes = list(config.depths) == [depths[stage] for stage in sorted(depths)]
        if config.layout == layout and same_sizes and list(config.hidden_sizes) == widths:
            return name
    raise ConversionError(
        f"No published variant has the layout {layout!r} with depths {list(depths.values())} and widths {widths}. Pass the "
        "official constructor arguments as `config`."
    )
