"""Checkpoints of the official TNT code, and of timm, which renames its keys and keeps an older design."""

import math
import re

import torch

from hf_attn.architectures.imaging import published_labels
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_tnt import TNTConfig
from .modeling_tnt import TNTForImageClassification, TNTModel


#: names in the official layout -> in ours
_OFFICIAL = (
    (r"^outer_tokens$", None),  # the official code has it and never uses it
    (r"^outer_pos$", "tnt.embeddings.position_embeddings"),
    (r"^inner_pos$", "tnt.embeddings.word_embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "tnt.embeddings.word_embeddings.projection."),
    (r"(^|\.)proj_norm([12])\.", r"\1words_to_sentence.norm\2."),
    (r"\.outer_norm([12])\.", r".norm\1."),
    (r"\.outer_attn\.", ".attention."),
    (r"\.outer_mlp\.", ".mlp."),
    (r"\.inner_attn\.", ".inner_attention."),
    (r"\.se_layer\.fc\.0\.", ".squeeze_excitation.norm."),
    (r"\.se_layer\.fc\.1\.", ".squeeze_excitation.fc1."),
    (r"\.se_layer\.fc\.3\.", ".squeeze_excitation.fc2."),
)
#: names in timm's layout -> in ours
_TIMM = (
    (r"^patch_pos$", "tnt.embeddings.position_embeddings"),
    (r"^pixel_pos$", "tnt.embeddings.word_embeddings.position_embeddings"),
    (r"^pixel_embed\.proj\.", "tnt.embeddings.word_embeddings.projection."),
    (r"(^|\.)norm([12])_proj\.", r"\1words_to_sentence.norm\2."),
    (r"\.norm_in\.", ".inner_norm1."),
    (r"\.norm_mlp_in\.", ".inner_norm2."),
    (r"\.norm_out\.", ".norm1."),
    (r"\.norm_mlp\.", ".norm2."),
    (r"\.attn_in\.", ".inner_attention."),
    (r"\.attn_out\.", ".attention."),
    (r"\.mlp_in\.", ".inner_mlp."),
)
_BOTH = (
    (r"attention\.(qk|v)\.", r"attention.\1_proj."),
    (r"attention\.proj\.", "attention.o_proj."),
    (r"^(blocks\.\d+\.|)proj\.", r"\1words_to_sentence.projection."),
    (r"^words_to_sentence\.", "tnt.embeddings.words_to_sentence."),
    (r"^cls_token$", "tnt.embeddings.cls_token"),
    (r"^blocks\.", "tnt.layers."),
    (r"^norm\.", "tnt.layernorm."),
    (r"^head\.", "classifier."),
)
_FROM_OFFICIAL, _FROM_TIMM = Renaming(*_OFFICIAL, *_BOTH), Renaming(*_TIMM, *_BOTH)

#: argument -> its name in timm's constructor
_TIMM_ARGUMENTS = {
    "outer_dim": "embed_dim",
    "outer_num_heads": "num_heads_outer",
    "inner_num_heads": "num_heads_inner",
    "inner_stride": "first_stride",
}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert either layout; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: weights in either layout. `outer_tokens`, which the official code has and never uses, is dropped.
        config: official constructor arguments (`img_size`, `patch_size`, `outer_dim`, `inner_dim`, `depth`,
            `outer_num_heads`, `inner_num_heads`, `mlp_ratio`, `qkv_bias`, `qk_scale`, `inner_stride`, `se`...) or timm's
            (`embed_dim`, `num_heads_outer`, `num_heads_inner`, `first_stride`, `legacy`, `global_pool`...). Published
            models need none.
    """
    timm = "patch_pos" in official
    names = _FROM_TIMM if timm else _FROM_OFFICIAL
    dropped, state = names.dropped(official), names.state_dict(official)
    if timm:
        name = names("pixel_pos")
        state[name] = state[name].flatten(2).transpose(1, 2)
    arguments = {name: config.get(_TIMM_ARGUMENTS.get(name, name) if timm else name) for name in _ARGUMENTS}
    if timm:
        arguments["pooling"] = {"token": "token", "avg": "mean"}[config.get("global_pool", "token")]
    ours = _config(state, arguments)
    if timm and "legacy" in config and config["legacy"] != ours.legacy:
        raise ConversionError(
            f"The weights are those of legacy={ours.legacy}, but the configuration says {config['legacy']}."
        )
    config.agree(se=int(ours.squeeze_excitation))
    config.leave("source")  # timm's note of where its weights come from
    config.agree(depth=ours.num_hidden_layers, in_chans=ours.num_channels, qkv_bias=ours.qkv_bias)
    if "classifier.weight" in state:
        config.agree(num_classes=ours.num_labels)
        return Converted(TNTForImageClassification, ours, state, dropped)
    config.leave("num_classes")
    state = {name.removeprefix("tnt."): tensor for name, tensor in state.items()}
    return Converted(TNTModel, ours, state, dropped)


_ARGUMENTS = (
    "img_size",
    "patch_size",
    "outer_dim",
    "inner_dim",
    "outer_num_heads",
    "inner_num_heads",
    "mlp_ratio",
    "qk_scale",
    "inner_stride",
    "drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)


def _config(state: dict[str, torch.Tensor], arguments: dict) -> TNTConfig:
    """Configuration from the shapes of the weights, and from arguments for the rest."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ConversionError(f"This is not a TNT checkpoint: no tensor corresponds to {name}.")
        return state[name].shape

    def given(name: str, default):
        return default if arguments[name] is None else arguments[name]

    hidden_size = shape("tnt.embeddings.cls_token")[-1]
    inner_hidden_size, num_channels = shape("tnt.embeddings.word_embeddings.projection.weight")[:2]
    first = "tnt.layers.0."
    legacy = first + "words_to_sentence.norm2.weight" not in state
    heads = {
        name: next(
            (
                fields[name]
                for fields in TNTConfig.variants.values()
                if (fields["hidden_size"], fields["inner_hidden_size"]) == (hidden_size, inner_hidden_size)
            ),
            None,
        )
        for name in ("num_attention_heads", "inner_num_attention_heads")
    }
    for name, argument in (
        ("num_attention_heads", "outer_num_heads"),
        ("inner_num_attention_heads", "inner_num_heads"),
    ):
        heads[name] = given(argument, heads[name])
        if heads[name] is None:
            raise ConversionError(
                f"The weights do not determine the number of heads. Pass {argument} (or timm's "
                f"{_TIMM_ARGUMENTS[argument]}) in `config`."
            )
    patch_size = given("patch_size", 16)
    patches = shape("tnt.embeddings.position_embeddings")[1] - 1
    return TNTConfig(
        image_size=given("img_size", patch_size * math.isqrt(patches)),
        patch_size=patch_size,
        num_channels=num_channels,
        inner_stride=given("inner_stride", 4),
        hidden_size=hidden_size,
        inner_hidden_size=inner_hidden_size,
        num_hidden_layers=1
        + max(int(match[1]) for name in state if (match := re.match(r"tnt\.layers\.(\d+)\.", name))),
        mlp_ratio=given("mlp_ratio", shape(first + "mlp.fc1.weight")[0] / hidden_size),
        inner_mlp_ratio=shape(first + "inner_mlp.fc1.weight")[0] / inner_hidden_size,
        qkv_bias=first + "attention.v_proj.bias" in state,
        qk_scale=arguments["qk_scale"],
        squeeze_excitation=first + "squeeze_excitation.fc1.weight" in state,
        legacy=legacy,
        pooling=arguments.get("pooling", "token"),
        hidden_dropout_prob=given("drop_rate", 0.0),
        attention_probs_dropout_prob=given("attn_drop_rate", 0.0),
        drop_path_rate=given("drop_path_rate", 0.0),
        **published_labels(shape("classifier.weight")[0] if "classifier.weight" in state else 2),
        **heads,
    )
