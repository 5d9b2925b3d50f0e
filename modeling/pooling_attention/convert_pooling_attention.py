# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the official code: the head alone (`attn_pool.pt`), or a decoder with its heads."""

import torch

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming, split_fused

from .configuration_pooling_attention import PoolingAttentionConfig
from .head import PoolingHead
from .modeling_pooling_attention import PoolingAttentionModel


_HEAD = (
    (r"(^|\.)pos_emb\.weight$", r"\1layer_embeddings"),
    (r"(^|\.)latents$", r"\1latents"),
    (r"cross_attend_blocks\.0\.norm\.", "attention.states_norm."),
    (r"cross_attend_blocks\.0\.norm_context\.", "attention.latents_norm."),
    (r"cross_attend_blocks\.0\.fn\.to_q\.", "attention.query."),
    (r"cross_attend_blocks\.0\.fn\.to_kv\.", "attention.to_kv."),
    (r"cross_attend_blocks\.0\.fn\.to_out\.", "attention.dense."),
    (r"cross_attend_blocks\.1\.norm\.", "feed_forward.norm."),
    (r"cross_attend_blocks\.1\.fn\.net\.0\.", "feed_forward.expand."),
    (r"cross_attend_blocks\.1\.fn\.net\.2\.", "feed_forward.contract."),
)
#: default number of heads of the official code; it does not follow from the shapes
_DEFAULT_HEADS = 32
_NO_FIELDS = ("architectures", "model_type", "transformers_version", "dtype", "use_cache")


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert either layout; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: a head (`latents`, `cross_attend_blocks...`), which becomes a `PoolingHead`, or a decoder (`llm.`) with the
            heads `last_pool.` and `multi_pool.`, of which the design's is taken.
        config: of a head, the official constructor arguments (`num_cross_heads`, 32 if not given, cannot be read off the
            shapes; the others may be given). Of a whole model, `llm` with the fields of the decoder's `config.json`, `pool`
            with the arguments of the head, and `design`, 1 to 5. With a `pad_token_id` design 5 takes its means by the official
            rule (`mean_over="pad_token_id"`).
    """
    if any(name.startswith("llm.") for name in official):
        return _convert_model(official, config)
    state = _split(Renaming(*_HEAD).state_dict(official))
    return Converted(PoolingHead, _head_arguments(state, config), state)


def _split(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return split_fused(state, "to_kv", ("key", "value"))


def _head_arguments(state: dict[str, torch.Tensor], config: OfficialArguments) -> dict[str, int]:
    """Constructor arguments of the head with these weights."""
    if not {"latents", "attention.query.weight"} <= state.keys():
        raise ConversionError("The head has no latents or no query projection (cross_attend_blocks.0.fn.to_q).")
    num_latents, width = state["latents"].shape
    inner = len(state["attention.query.weight"])
    heads = config.get("num_cross_heads", _DEFAULT_HEADS)
    if inner % heads:
        raise ConversionError(
            f"The head has {inner} channels, which are not a multiple of {heads} attention heads: pass "
            "num_cross_heads."
        )
    for name in ("dim", "hidden_dim", "latent_dim"):
        if config.get(name, width) != width:
            raise ConversionError(
                f"{name}={config[name]}, but the weights are {width} wide. The official code needs equal widths of the decoder "
                "and the latents."
            )
    config.agree(cross_dim_head=inner // heads, num_latents_value=num_latents)
    num_layers = len(state["layer_embeddings"]) if "layer_embeddings" in state else 0
    if num_layers:
        config.agree(layers=num_layers)
    else:
        config.leave("layers")
    return {
        "hidden_size": width,
        "num_latents": num_latents,
        "num_heads": heads,
        "head_dim": inner // heads,
        "num_layers": num_layers,
    }


def _convert_model(official: StateDict, config: OfficialArguments) -> Converted:
    design = config["design"]
    if design not in (1, 2, 3, 4, 5):
        raise ConversionError(f"design must be 1 to 5, got {design!r}.")
    taken, other = ("multi_pool", "last_pool") if design in (3, 5) else ("last_pool", "multi_pool")
    if design == 1:
        other = "last_pool|multi_pool"
    names = Renaming((rf"^({other})\.", None), (r"^llm\.", "model."), (rf"^{taken}\.", "head."), *_HEAD)
    state = _split(names.state_dict(official))
    fields = _decoder_fields(config["llm"], state)
    config.leave("loss_scale", "pool")
    for name in ("pad_token_id", "eos_token_id"):
        if name in config:
            fields[name] = config[name]
    if design > 3:
        fields |= {"sliding_window": None, "layer_types": None}
    if design == 5 and fields.get("pad_token_id") is not None:
        fields["mean_over"] = "pad_token_id"
    if design > 1:
        arguments = OfficialArguments({**config.get("pool", {})})
        weights = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        head = _head_arguments(weights, arguments)
        arguments.check("pooling_attention")
        fields |= {
            "num_latents": head["num_latents"],
            "num_pooling_heads": head["num_heads"],
            "pooling_head_dim": head["head_dim"],
        }
        if head["num_layers"]:
            config.agree(layers=head["num_layers"])
    config.leave("layers")
    family_config = PoolingAttentionConfig(**fields, design=design)
    return Converted(PoolingAttentionModel, family_config, state, names.dropped(official))


def _decoder_fields(official: dict, state: dict[str, torch.Tensor]) -> dict:
    """Fields of the decoder from its `config.json`; where architectures differ in the layers, the weights say which it is."""
    known = PoolingAttentionConfig.__dataclass_fields__
    fields = {name: value for name, value in official.items() if name in known and name not in _NO_FIELDS}
    if "rope_theta" in official and fields.get("rope_parameters") is None:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": float(official["rope_theta"])}
    if official.get("use_sliding_window") is False:
        fields |= {"sliding_window": None, "layer_types": None}
    layer = "model.layers.0.self_attn."
    return fields | {
        "attention_bias": f"{layer}q_proj.bias" in state,
        "attention_output_bias": f"{layer}o_proj.bias" in state,
        "qk_norm": f"{layer}q_norm.weight" in state,
    }
