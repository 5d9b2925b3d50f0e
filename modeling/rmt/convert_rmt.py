"""Checkpoints of the official RMT code: classifiers, dense backbones, and its attention module by itself."""

import re

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_rmt import RMTConfig
from .modeling_rmt import RMTAttention, RMTBackbone, RMTForImageClassification, RMTRelativePositions


#: place in the official stem -> ours; GELUs are in between
_STEM = {0: "0.conv", 1: "0.norm", 3: "1.conv", 4: "1.norm", 6: "2.conv", 7: "2.norm", 9: "3.conv", 10: "3.norm"}
#: official name -> ours, within the attention module
_ATTENTION = (
    (r"(^|\.)Relpos\.(angle|decay)$", None),
    (r"(^|\.)lepe\.conv\.", r"\1local_enhancement.conv."),
    (r"(^|\.)out_proj\.", r"\1o_proj."),
)
#: official name -> ours, in [`RMTForImageClassification`], or [`RMTBackbone`] for a dense model
OUR_NAMES = Renaming(
    (r"^patch_embed\.proj\.(\d+)\.", lambda match: f"embeddings.layers.{_STEM[int(match[1])]}."),
    # A stage ends with the downsampling in the official code, and begins with it in ours.
    (r"^layers\.(\d+)\.downsample\.reduction\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.downsampling.conv."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.downsampling.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.", ".attention."),
    (r"\.ffn\.dwconv\.", ".mlp.depthwise_conv."),
    (r"\.ffn\.", ".mlp."),
    (r"\.pos\.", ".position_conv."),
    (r"\.gamma_([12])$", r".layer_scale\1"),
    (r"^extra_norms\.(\d+)\.", lambda match: f"feature_norms.stage{int(match[1]) + 1}."),
    (r"^proj\.", "head.projection."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"classifier.\1"),
    (r"^aux_head\.", "token_classifier."),
    *_ATTENTION,
)
_ATTENTION_NAMES = Renaming(*_ATTENTION, (r"^[qkv]_proj\.", r"\g<0>"))


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert any of the layouts; see [`hf_attn.checkpoints.official.from_official`].

    The released files hold two sets of weights, `model` and `model_ema`. The numbers that the authors report for S, B and L
    are those of `model_ema`, for T those of `model`: pass `torch.load(file)["model_ema"]`.

    Args:
        official: weights of a classifier, with or without `aux_head`, of a dense model (`extra_norms`), or of an attention
            module (`q_proj`...). The tables in `Relpos` have to be those of the configuration; they are computed.
        config: official constructor arguments: `embed_dims`, `depths`, `num_heads`, `init_values`, `heads_ranges`,
            `mlp_ratios`, `chunkwise_recurrents`, `layerscales`, `layer_init_values`, `projection`, `drop_path_rate`,
            `out_indices`; published models need none. Of an attention module: `embed_dim`, `num_heads`, `initial_value`,
            `heads_range`.
    """
    if "q_proj.weight" in official:
        return _convert_attention(official, config)
    if "patch_embed.proj.0.weight" not in official:
        raise ConversionError(
            "This is not an official layout of RMT: neither a model (patch_embed.proj.0.weight) nor an attention "
            "module (q_proj.weight)."
        )
    ours = _config(official, config)
    _check_tables(official, ours)
    state = OUR_NAMES.state_dict(official)
    if "extra_norms.0.weight" in official:
        stages = config.get("out_indices", range(len(ours.depths)))
        ours.out_features = [f"stage{stage + 1}" for stage in stages]
        model_class, prefix = RMTBackbone, ""
        other_stages = {f"stage{stage + 1}" for stage in range(len(ours.depths))} - set(ours.out_features)
        unused = tuple(f"feature_norms.{stage}." for stage in other_stages)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    else:
        model_class, prefix = RMTForImageClassification, "rmt."
    state = {
        # (1, 1, 1, channels) in the official code
        prefix * name.startswith(("embeddings.", "encoder.")) + name: t.flatten() if "layer_scale" in name else t
        for name, t in state.items()
    }
    return Converted(model_class, ours, state, OUR_NAMES.dropped(official))


def _config(official: StateDict, config: dict) -> RMTConfig:
    """Configuration from the shapes of the weights, from arguments, and from the published variant of these shapes."""

    def count(pattern: str) -> int:
        return 1 + max((int(match[1]) for name in official if (match := re.match(pattern, name))), default=-1)

    stages = range(count(r"layers\.(\d+)\."))
    first = [f"layers.{stage}.blocks.0." for stage in stages]
    hidden_sizes = [official[name + "final_layer_norm.weight"].shape[0] for name in first]
    depths = [count(rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in stages]
    variant = next(
        (
            fields
            for fields in RMTConfig.variants.values()
            if fields["hidden_sizes"] == hidden_sizes and fields["depths"] == depths
        ),
        {},
    )

    def argument(name: str, field: str):
        # An argument that is neither given nor published is an error that names it.
        return list(variant[field]) if field in variant and name not in config else list(config[name])

    is_classifier = "proj.weight" in official
    num_labels = official["head.weight"].shape[0] if "head.weight" in official else 0
    token_labeling = "aux_head.weight" in official
    if token_labeling and official["aux_head.weight"].shape[1] != hidden_sizes[-1]:
        raise ConversionError(
            f"aux_head takes {official['aux_head.weight'].shape[1]} features, but the last stage has "
            f"{hidden_sizes[-1]}. The official code has no such model, so the input of the head is unknown. Remove "
            "the keys aux_head.* to convert the classifier only."
        )
    num_channels = official["patch_embed.proj.0.weight"].shape[1]
    mlp_ratios = [
        official[name + "ffn.fc1.weight"].shape[0] / width for name, width in zip(first, hidden_sizes, strict=True)
    ]
    layerscales = [name + "gamma_1" in official for name in first]
    config.agree(
        in_chans=num_channels, embed_dims=hidden_sizes, depths=depths, mlp_ratios=mlp_ratios, layerscales=layerscales
    )
    if is_classifier:
        config.agree(num_classes=num_labels, projection=official["proj.weight"].shape[0])
    # Switches of the training, and the options of dense prediction, whose weights say the same.
    config.leave(
        "num_classes", "projection", "norm_layer", "use_checkpoints", "patch_norm", "token_label", "out_indices"
    )
    return RMTConfig(
        num_channels=num_channels,
        hidden_sizes=hidden_sizes,
        depths=depths,
        num_attention_heads=argument("num_heads", "num_attention_heads"),
        decay_initial_values=list(config.get("init_values", [2] * len(stages))),
        decay_ranges=argument("heads_ranges", "decay_ranges"),
        mlp_ratios=mlp_ratios,
        axis_decomposed=argument("chunkwise_recurrents", "axis_decomposed"),
        layerscales=layerscales,
        layer_scale_init_value=config.get("layer_init_values", 1e-6),
        projection_dim=official["proj.weight"].shape[0] if is_classifier else 1024,
        token_labeling=token_labeling,
        drop_path_rate=config.get("drop_path_rate", variant.get("drop_path_rate", 0.0)),
        **published_labels(num_labels if is_classifier else 2),
    )


def _check_tables(official: StateDict, config: RMTConfig) -> None:
    for stage, (hidden_size, num_heads) in enumerate(
        zip(config.hidden_sizes, config.num_attention_heads, strict=True)
    ):
        positions = RMTRelativePositions(
            hidden_size // num_heads,
            num_heads,
            config.decay_initial_values[stage],
            config.decay_ranges[stage],
            axis_decomposed=config.axis_decomposed[stage],
        )
        _check_table(official, f"layers.{stage}.Relpos.", positions)


def _check_table(official: StateDict, prefix: str, positions: RMTRelativePositions) -> None:
    for name, table in (("decay", positions.log_decay()), ("angle", positions.angles())):
        if prefix + name not in official:
            continue
        # Half-precision files round the tables.
        found = official[prefix + name].float()
        if found.shape != table.shape or not torch.allclose(found, table, rtol=1e-2, atol=1e-5):
            raise ConversionError(
                f"{prefix}{name} does not match the configuration (number of heads, init_values, heads_ranges): "
                f"{found.tolist()} instead of {table.tolist()}."
            )


def _convert_attention(official: StateDict, config: dict) -> Converted:
    num_heads, hidden_size = config["num_heads"], official["q_proj.weight"].shape[0]
    config.agree(embed_dim=hidden_size)
    config.leave("grid")  # of the input
    positions = RMTRelativePositions(
        hidden_size // num_heads, num_heads, config["initial_value"], config["heads_range"], axis_decomposed=False
    )
    _check_table(official, "Relpos.", positions)
    dropped, state = _ATTENTION_NAMES.dropped(official), _ATTENTION_NAMES.state_dict(official)
    arguments = {"config": RMTConfig(), "hidden_size": hidden_size, "num_heads": num_heads}
    return Converted(RMTAttention, arguments, state, dropped)
