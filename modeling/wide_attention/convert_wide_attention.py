"""Checkpoints in the layout of the reference implementation (the authors published neither code nor weights)."""

from typing import Any

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_wide_attention import ATTENTION_TYPES, WideTransformerConfig
from .modeling_wide_attention import WideTransformerForDocumentMatching, WideTransformerForSequenceClassification


#: official name of an attention type -> ours, for those that differ
_TYPES = {"vanilla": "softmax", "full": "softmax", "sliding": "longformer", "sliding_window": "longformer"}
#: official names of an argument of an attention type, the first one ours
_ARGUMENTS = {
    "rank": ("rank", "r", "k"),
    "block_size": ("block_size", "block"),
    "max_blocks": ("max_blocks", "max_num_blocks"),
    "summary_size": ("summary_size", "summary", "stride", "c"),
    "window_size": ("window_size", "window", "w"),
    "num_global_tokens": ("num_global_tokens", "num_global"),
    "num_random_blocks": ("num_random_blocks",),
    "seed": ("seed",),
    "num_features": ("num_features", "nb_features"),
    "kernel": ("kernel",),
}
_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^cls$", "model.cls_token.weight"),
    (r"^final_norm\.", "model.norm."),
    (r"^head\.fc([123])\.", lambda match: f"classifier.layers.{int(match[1]) - 1}."),
    (r"^(layers\.\d+)\.norm1\.", r"model.\1.input_layernorm."),
    (r"^(layers\.\d+)\.norm2\.", r"model.\1.post_attention_layernorm."),
    (r"^(layers\.\d+)\.mlp\.fc1\.", r"model.\1.mlp.up_proj."),
    (r"^(layers\.\d+)\.mlp\.fc2\.", r"model.\1.mlp.down_proj."),
    (r"^(layers\.\d+)\.attn\.([qkv])\.", r"model.\1.self_attn.\2_proj."),
    (r"^(layers\.\d+)\.attn\.out\.", r"model.\1.self_attn.o_proj."),
)
#: attention type -> names of its own weights
_OWN_WEIGHTS = {
    "linformer": ("token_projection",),
    "synthesizer": ("left_factor", "right_factor"),
    "performer": ("directions",),
    "sinkhorn": ("block_scores.bias", "block_scores.weight"),
    "longformer": tuple(f"{part}_proj_global.weight" for part in "kqv"),
}


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict with `embed`, `cls`, `layers.<i>.{norm1,attn.{q,k,v,out},norm2,mlp.{fc1,fc2}}`, `final_norm` and
            `head.{fc1,fc2}`; a `head.fc3` makes it a model that matches documents, whose `cls` is not used. Weights of an
            attention type are taken in the alphabetical order of their names.
        config: `vocab_size`, `hidden_size`, `head_dim`, `mlp_dim`, `num_classes`, `num_layers`, `num_heads`,
            `attention_type`, its arguments (or `attention_kwargs` with all of them), and `max_length`. Those that the weights
            tell need not be given.
    """
    matches = "head.fc3.weight" in official
    num_layers = len({name.split(".")[1] for name in official if name.startswith("layers.")})
    vocab_size, hidden_size = official["embed.weight"].shape
    output = official["layers.0.attn.out.weight"]
    mlp_dim = official["layers.0.mlp.fc1.weight"].shape[0]
    num_classes = official[f"head.fc{3 if matches else 2}.weight"].shape[0]
    config.agree(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_dim,
        num_layers=num_layers,
        num_classes=num_classes,
    )
    if config.get("head_dim") is None and config.get("num_heads") is None:
        raise ConversionError(
            "The weights do not determine the head dimension: the configuration needs head_dim or num_heads."
        )
    inner = output.shape[1]
    head_dim = config.get("head_dim") or inner // config["num_heads"]
    if inner % head_dim:
        raise ConversionError(f"head_dim={head_dim} does not divide the width of all heads, {inner}.")
    config.agree(num_heads=inner // head_dim)
    config.leave("dropout", "dropout_rate", "attention_dropout", "attention_dropout_rate")

    attention_type = config.get("attention_type", "softmax")
    attention_type = _TYPES.get(attention_type, attention_type)
    if attention_type not in ATTENTION_TYPES:
        raise ConversionError(f"attention_type must be one of {', '.join((*ATTENTION_TYPES, *_TYPES))}.")
    # Names that no rule matches are weights of an attention type.
    others = sorted(name for name in Renaming(*_NAMES).unknown(official) if ".attn." in name)
    own = {index: [name for name in others if name.startswith(f"layers.{index}.attn.")] for index in range(num_layers)}
    tables = [official[name] for name in own[0]]
    family_config = WideTransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=mlp_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=inner // head_dim,
        head_dim=head_dim,
        max_position_embeddings=_max_length(config, attention_type, tables),
        attention_type=attention_type,
        attention_kwargs=_attention_arguments(config, attention_type, tables),
        attention_bias="layers.0.attn.q.bias" in official,
        attention_output_bias="layers.0.attn.out.bias" in official,
        pooling=config.get("pooling", "first" if matches else "cls" if "cls" in official else "mean"),
        num_labels=num_classes,
    )
    names = _names(family_config)
    return Converted(
        WideTransformerForDocumentMatching if matches else WideTransformerForSequenceClassification,
        family_config,
        _state_dict(official, family_config, own, names),
        dropped=names.dropped(official),
    )


def _max_length(config: OfficialArguments, attention_type: str, tables: list[torch.Tensor]) -> int:
    """Longest input without the class token; tables over positions are as long as they are."""
    rows = {"linformer": 0, "synthesizer": 1}.get(attention_type)
    if tables and rows is not None:
        longest = tables[0].shape[rows] - 1
        given = config.get("max_length", longest)
        if given not in (longest, longest + 1):
            raise ConversionError(
                f"The weights have tables for max_length={longest} and a class token, but the configuration says {given}."
            )
        return longest
    return config.get("max_length", WideTransformerConfig.max_position_embeddings)


def _attention_arguments(config: OfficialArguments, attention_type: str, tables: list[torch.Tensor]) -> dict[str, Any]:
    given = dict(config.get("attention_kwargs") or {})
    known = {official: ours for ours in ATTENTION_TYPES[attention_type] for official in _ARGUMENTS[ours]}
    given |= {official: config[official] for official in known if official in config}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConversionError(
            f"attention_type={attention_type!r} does not support the arguments {', '.join(unknown)}. Supported: "
            f"{', '.join(known) or 'none'}."
        )
    arguments = {known[name]: value for name, value in given.items() if value is not None}
    if tables:
        found = {
            "linformer": ("rank", -1),
            "synthesizer": ("rank", -1),
            "performer": ("num_features", 0),
            "sinkhorn": ("max_blocks", 0),
        }.get(attention_type)
        if found is not None:
            arguments.setdefault(found[0], tables[0].shape[found[1]])
    return arguments


def _names(config: WideTransformerConfig) -> Renaming:
    rules = list(_NAMES)
    if config.pooling != "cls":
        rules.insert(0, (r"^cls$", None))
    if config.attention_type == "synthesizer":
        # Its weights do not depend on the tokens.
        rules.insert(0, (r"\.attn\.[qk]\.", None))
    return Renaming(*rules)


def _state_dict(
    official: StateDict, config: WideTransformerConfig, own: dict[int, list[str]], rules: Renaming
) -> dict[str, torch.Tensor]:
    state = rules.state_dict(official)
    if config.pooling == "cls":
        state["model.cls_token.weight"] = state["model.cls_token.weight"].flatten()
    names = _OWN_WEIGHTS.get(config.attention_type, ())
    for index, found in own.items():
        if found and len(found) != len(names):
            raise ConversionError(
                f"attention_type={config.attention_type!r} has the weights {', '.join(names) or 'of softmax attention'}, but "
                f"the checkpoint has {', '.join(found)}."
            )
        state |= {
            f"model.layers.{index}.self_attn.{ours}": official[theirs]
            for ours, theirs in zip(names, found, strict=False)
        }
    return state
