"""Official checkpoints of sigmoid attention: AXLearn's "Gala" models, and the attention simulator's.

Both interleave the pairs of the rotary embedding, (2i, 2i + 1); transformers pairs the halves of a head, (i, i + d/2).
The rows of the query and key projections (and the weights of their norms) are reordered accordingly, which changes
neither the scores nor the norms.
"""

import math
import re
from collections.abc import Mapping

import torch

from hf_attn.architectures.rotary import half_split, interleaved
from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming, split_fused

from .configuration_sigmoid_attention import SigmoidAttentionConfig
from .modeling_sigmoid_attention import SigmoidAttentionForCausalLM, SigmoidCrossAttention


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert any of the official layouts; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: official weights.
        config: AXLearn's: `num_layers`, `hidden_dim`, `num_heads`, `vocab_size`, `ffn_dim`, `norm_structure`,
            `position_encoding`, `seq_len`, `subtract_seq_len_bias`. The simulator's: `vocab_size`, `dim`, `num_heads`,
            `num_blocks`, `mlp_hidden`, `bias`, `qk_norm`, `position`, `attn_bias`, `attn_temp`, `layerscale`. Its
            cross-attention's: `q_dim`, `kv_dim`, `num_heads`, `bias`, `qk_norm`, `attn_bias`,
            `attn_temp`, and `position` ("rope" for `RoPECrossAttention`, whose weights do not tell it apart).
    """
    if "decoder/emb/token_emb/weight" in official:
        return _convert_gala(official, config)
    if "input_embedding.weight" in official:
        return _convert_simulator(official, config)
    if "kv_proj.weight" in official:
        return _convert_cross_attention(official, config)
    raise ConversionError(
        "This is not an official layout of sigmoid attention: neither AXLearn's (decoder/emb/token_emb/weight) nor "
        "the simulator's (input_embedding.weight, or kv_proj.weight for cross-attention)."
    )


# --- AXLearn -------------------------------------------------------------------------------------------------------


_GALA_LAYER = "decoder/transformer/repeat/layer/"
_GALA_POSITIONS = {"alibi": "alibi", "rope": "rope"}


def _gala_config(config: dict) -> SigmoidAttentionConfig:
    position = _GALA_POSITIONS.get(config["position_encoding"])
    if position is None:
        raise ConversionError(
            f"position_encoding must be one of {', '.join(_GALA_POSITIONS)}, got {config['position_encoding']!r}."
        )
    return SigmoidAttentionConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_dim"],
        intermediate_size=config["ffn_dim"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        max_position_embeddings=config["seq_len"],
        sigmoid_bias=-math.log(config["seq_len"]) if config.get("subtract_seq_len_bias", True) else 0.0,
        position_embedding_type=position,
        norm_structure=config["norm_structure"],
        qk_norm_after_rope=True,
        # The layer that separates segments exists only with ALiBi.
        separate_trailing_padding=position == "alibi",
    )


def _gala_names(config: SigmoidAttentionConfig) -> dict[str, str]:
    """Our name inside a layer -> official name, for the tensors that are stacked over layers."""
    projection = "i_proj/i_proj" if config.position_embedding_type == "rope" else "i_proj"
    names = {
        "self_attn.qkv": f"self_attention/attention/{projection}/qkv_proj/weight",
        "self_attn.o_proj.weight": "self_attention/attention/o_proj/weight",
        "self_attn.q_norm.weight": "self_attention/attention/scale_query/norm/scale",
        "self_attn.k_norm.weight": "self_attention/attention/scale_key/norm/scale",
        "mlp.gate_proj.weight": "feed_forward/linear1_0/weight",
        "mlp.up_proj.weight": "feed_forward/linear1_1/weight",
        "mlp.down_proj.weight": "feed_forward/linear2/weight",
    }
    if config.norm_structure == "hybridnorm":
        names["input_layernorm.weight"] = "self_attention/prenorm/scale"
        names["post_attention_layernorm.weight"] = "self_attention/postnorm/scale"
        names["pre_feedforward_layernorm.weight"] = "feed_forward/prenorm/scale"
        names["post_feedforward_layernorm.weight"] = "feed_forward/postnorm/scale"
    else:
        names["input_layernorm.weight"] = "self_attention/norm/scale"
        names["pre_feedforward_layernorm.weight"] = "feed_forward/norm/scale"
    return {ours: _GALA_LAYER + theirs for ours, theirs in names.items()}


def _convert_gala(official: StateDict, arguments: dict) -> Converted:
    config = _gala_config(arguments)
    rotary = config.position_embedding_type == "rope"
    head_dim = config.head_dim

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        return half_split(tensor, head_dim) if rotary else tensor

    embedding = official["decoder/emb/token_emb/weight"]
    state = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": official["decoder/output_norm/scale"],
    }
    names = _gala_names(config)
    stacked = {ours: official[theirs] for ours, theirs in names.items()}
    depths = {tensor.shape[0] for tensor in stacked.values()}
    if depths != {config.num_hidden_layers}:
        raise ConversionError(
            f"num_layers is {config.num_hidden_layers}, but the checkpoint has "
            f"{' or '.join(map(str, sorted(depths)))} layers."
        )
    for index in range(config.num_hidden_layers):
        layer = {ours: tensor[index] for ours, tensor in stacked.items()}
        # (in, heads, head_dim) -> (heads * head_dim, in)
        query, key, value = (weight.flatten(1).T for weight in layer.pop("self_attn.qkv"))
        layer["self_attn.q_proj.weight"], layer["self_attn.k_proj.weight"] = reorder(query), reorder(key)
        layer["self_attn.v_proj.weight"] = value
        layer["self_attn.o_proj.weight"] = layer["self_attn.o_proj.weight"].flatten(1)
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            layer[name] = reorder(layer[name])
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
            layer[name] = layer[name].T
        state.update({f"model.layers.{index}.{name}": tensor.contiguous() for name, tensor in layer.items()})
    return Converted(SigmoidAttentionForCausalLM, config, state)


# --- the simulator -------------------------------------------------------------------------------------------------


_SIMULATOR_BLOCK = {
    "norm1": "input_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
_SIMULATOR = Renaming(
    (r"^input_embedding\.", "model.embed_tokens."),
    (r"^output_embedding\.norm\.", "model.norm."),
    (r"^output_embedding\.linear\.", "lm_head."),
    (r"\.attn\.attn_(bias|temp)$", None),  # in the configuration
    (r"^blocks\.", "model.layers."),
    (r"\.ls1\.gamma$", ".attention_scale.weight"),
    (r"\.ls2\.gamma$", ".mlp_scale.weight"),
    *((rf"\.{re.escape(theirs)}\.", f".{ours}.") for theirs, ours in _SIMULATOR_BLOCK.items()),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)
_CROSS_ATTENTION = Renaming(
    (r"^attn_(bias|temp)$", None), (r"^proj\.", "o_proj."), (r"^\w+\.(weight|bias)$", r"\g<0>")
)
_SIMULATOR_POSITIONS = {"rope": "rope", "alibi": "alibi", "sincos": "sincos", "none": "none", None: "none"}


def _constant(official: StateDict, names: list[str], default: float) -> float:
    """The value that the buffers `names` share."""
    values = {official[name].item() for name in names if name in official}
    if len(values) > 1:
        raise ConversionError(
            f"The blocks have different values for {names[0].rsplit('.', 1)[-1]}: {sorted(values)}. The family "
            "supports only one value for all layers."
        )
    return values.pop() if values else default


def _convert_simulator(official: StateDict, arguments: dict) -> Converted:
    blocks = range(arguments["num_blocks"])
    position = arguments.get("position")
    if position not in _SIMULATOR_POSITIONS:
        raise ConversionError(f"position must be one of rope, alibi, sincos or none, got {position!r}.")
    config = SigmoidAttentionConfig(
        vocab_size=arguments["vocab_size"],
        hidden_size=arguments["dim"],
        intermediate_size=arguments["mlp_hidden"],
        num_hidden_layers=len(blocks),
        num_attention_heads=arguments["num_heads"],
        sigmoid_bias=_constant(
            official, [f"blocks.{i}.attn.attn_bias" for i in blocks], arguments.get("attn_bias") or 0.0
        ),
        attention_log_temperature=_constant(
            official, [f"blocks.{i}.attn.attn_temp" for i in blocks], arguments.get("attn_temp") or 0.0
        ),
        position_embedding_type=_SIMULATOR_POSITIONS[position],
        norm_structure="prenorm",
        norm_type="layer_norm",
        final_norm_eps=1e-6,
        qk_norm=arguments.get("qk_norm", False),
        layer_scale_init_value=1e-4 if arguments.get("layerscale", False) else None,
        hidden_act="gelu",
        gated_mlp=False,
        attention_bias=arguments.get("bias", False),
        mlp_bias="blocks.0.mlp.fc2.bias" in official,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    state = split_fused(_SIMULATOR.state_dict(official), "qkv")
    if config.mlp_bias:
        # The simulator's first layer never has one.
        state.update({f"model.layers.{i}.mlp.up_proj.bias": torch.zeros(config.intermediate_size) for i in blocks})
    if config.position_embedding_type == "rope":
        state = _half_split(state, config.head_dim)
    return Converted(SigmoidAttentionForCausalLM, config, state, _SIMULATOR.dropped(official))


def _half_split(state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Queries, keys and their norms with the pairs of the rotary embedding as halves of a head."""
    turned = ("q_proj", "k_proj", "q_norm", "k_norm")
    return {
        name: half_split(tensor, head_dim) if name.split(".")[-2] in turned else tensor
        for name, tensor in state.items()
    }


def _convert_cross_attention(official: StateDict, arguments: dict) -> Converted:
    position = arguments.get("position")
    if position not in (None, "none", "rope"):
        raise ConversionError(f"position of cross-attention must be rope or none, got {position!r}.")
    rotary, head_dim = position == "rope", arguments["q_dim"] // arguments["num_heads"]
    state = split_fused(_CROSS_ATTENTION.state_dict(official), "kv_proj", ("k_proj", "v_proj"))
    if rotary:
        state = _half_split(state, head_dim)
    config = {
        "query_dim": arguments["q_dim"],
        "key_value_dim": arguments["kv_dim"],
        "num_heads": arguments["num_heads"],
        "sigmoid_bias": _constant(official, ["attn_bias"], arguments.get("attn_bias") or 0.0),
        "log_temperature": _constant(official, ["attn_temp"], arguments.get("attn_temp") or 0.0),
        "qk_norm": arguments.get("qk_norm", False),
        "use_bias": arguments.get("bias", False),
        "rope_theta": 10000.0 if rotary else None,
    }
    return Converted(SigmoidCrossAttention, config, state, _CROSS_ATTENTION.dropped(official))


# --- to the official layouts --------------------------------------------------------------------------------------------------


def to_official(tensors: Mapping[str, torch.Tensor], config: SigmoidAttentionConfig) -> dict[str, torch.Tensor]:
    """Rename and reshape tensors of our model (weights or their gradients) to the official layout.

    Args:
        tensors: our names -> tensors; a complete set of one model.
        config: configuration of the model; models with `norm_type="rms_norm"` are written in AXLearn's layout, those with
            `"layer_norm"` in the simulator's.

    Returns:
        Official names -> tensors, without the simulator's constant buffers.
    """
    if config.norm_type == "rms_norm":
        return _to_gala(tensors, config)
    return _to_simulator(tensors, config)


def _queries_and_keys(tensors: Mapping[str, torch.Tensor], name: str, config: SigmoidAttentionConfig) -> torch.Tensor:
    tensor = tensors[name]
    return interleaved(tensor, config.head_dim) if config.position_embedding_type == "rope" else tensor


def _to_gala(tensors: Mapping[str, torch.Tensor], config: SigmoidAttentionConfig) -> dict[str, torch.Tensor]:
    heads = (config.num_attention_heads, config.head_dim)
    official = {
        "decoder/emb/token_emb/weight": tensors["model.embed_tokens.weight"],
        "decoder/output_norm/scale": tensors["model.norm.weight"],
    }
    for ours, theirs in _gala_names(config).items():
        stack = []
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}."
            if ours == "self_attn.qkv":
                projections = (
                    _queries_and_keys(tensors, f"{layer}self_attn.q_proj.weight", config),
                    _queries_and_keys(tensors, f"{layer}self_attn.k_proj.weight", config),
                    tensors[f"{layer}self_attn.v_proj.weight"],
                )
                tensor = torch.stack([projection.T.unflatten(1, heads) for projection in projections])
            elif ours == "self_attn.o_proj.weight":
                tensor = tensors[layer + ours].unflatten(1, heads)
            elif ours in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
                tensor = _queries_and_keys(tensors, layer + ours, config)
            else:
                tensor = tensors[layer + ours]
                tensor = tensor.T if ours.startswith("mlp") else tensor
            stack.append(tensor)
        official[theirs] = torch.stack(stack)
    return official


def _to_simulator(tensors: Mapping[str, torch.Tensor], config: SigmoidAttentionConfig) -> dict[str, torch.Tensor]:
    theirs = {ours: official for official, ours in _SIMULATOR_BLOCK.items()}
    official = {
        "input_embedding.weight": tensors["model.embed_tokens.weight"],
        "output_embedding.norm.weight": tensors["model.norm.weight"],
        "output_embedding.norm.bias": tensors["model.norm.bias"],
        "output_embedding.linear.weight": tensors["lm_head.weight"],
    }
    for name, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            continue
        index, module, kind = match.groups()
        block = f"blocks.{index}."
        if module == "self_attn.q_proj":
            official[f"{block}attn.qkv.{kind}"] = torch.cat(
                (
                    _queries_and_keys(tensors, name, config),
                    _queries_and_keys(tensors, name.replace("q_proj", "k_proj"), config),
                    tensors[name.replace("q_proj", "v_proj")],
                )
            )
        elif module in ("attention_scale", "mlp_scale"):
            official[f"{block}{'ls1' if module == 'attention_scale' else 'ls2'}.gamma"] = tensor
        elif module in ("self_attn.q_norm", "self_attn.k_norm"):
            official[f"{block}{theirs[module]}.{kind}"] = _queries_and_keys(tensors, name, config)
        elif module in theirs:
            official[f"{block}{theirs[module]}.{kind}"] = tensor
    return official
