"""Checkpoints of the public code, a GPT-NeoX, as it would write them; none is published."""

from hf_attn.architectures.memory_layer import MemoryLayer
from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_memoryformer import MemoryFormerConfig
from .modeling_memoryformer import MemoryFormerForCausalLM


OUR_NAMES = Renaming(
    (r"^sequential\.0\.word_embeddings\.", "model.embed_tokens."),
    (r"^sequential\.\d+\.norm\.", "model.norm."),
    (r"^sequential\.\d+\.final_linear\.", "lm_head."),
    (r"^sequential\.(\d+)\.", lambda match: f"model.layers.{int(match[1]) - 2}."),
    (r"\.attention\.([qkv])(uery|ey|alue)_proj\.", r".self_attn.\1_proj."),
    (r"\.mlp\.0\.", ".mlp.up_proj."),
    (r"\.mlp\.1\.", ".mlp.layernorm."),
    (r"\.mlp\.2\.", ".mlp.down_proj."),
    (r"\.scale$", ".weight"),
)
#: settings of all published configurations, the only ones that are supported
_FIXED = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "gpt_j_residual": False,
    "double_mlp_table": True,
    "mlp_expand_type": "extra_bit",
    "mlp_type": "MemoryBlock",
}
_FIXED_IN_MEMORY = {
    "fc_qkv": False,
    "remove_projection": True,
    "shared_projection": False,
    "del_dense": True,
    "act_pos": "none",
}
#: without effect while there is no projection in front of the hash and no activation
_WITHOUT_EFFECT = ("projection_type", "block_size", "learn_weight", "act_fn", "bias", "aux_loss")
#: settings of a training; a configuration that has one is that of a whole training
_TRAINING = ("train_iters", "optimizer", "data_path", "seq_length")


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: official weights, of a model or of one memory layer.
        config: the yml's: `num_layers`, `num_attention_heads`, `rotary_pct`, `attn_memory_config`, `memory_config` and the
            others of the published files, with hyphens or underscores. Of one layer: `level="memory_layer"`, `hidden_size`,
            `output_size`, `ffn_num_table`, `code_length`.
    """
    if "tables" in official:
        return _convert_layer(official, config)
    # NeoX takes both spellings.
    arguments = OfficialArguments({str(name).replace("-", "_"): config[name] for name in config})
    converted = _convert_model(official, arguments)
    if any(name in arguments for name in _TRAINING):
        arguments.leave_rest()
    arguments.check("memoryformer")
    return converted


def _require(arguments: OfficialArguments, fixed: dict) -> None:
    for name, value in fixed.items():
        given = arguments.get(name, value)
        if given != value:
            raise ConversionError(
                f"Only {name}={value!r} is supported, as in the published configurations; got {given!r}."
            )


def _convert_layer(official: StateDict, config: OfficialArguments) -> Converted:
    tables = official["tables"]
    config.agree(level="memory_layer", output_size=tables.shape[1])
    _require(config, {"remove_projection": True})
    config.leave(*_WITHOUT_EFFECT)
    num_tables, code_length = config["ffn_num_table"], config["code_length"]
    arguments = {
        "in_features": config.get("hidden_size", num_tables * code_length),
        "out_features": tables.shape[1],
        "code_length": code_length,
        "num_tables": num_tables,
    }
    return Converted(MemoryLayer, arguments, {"tables": tables, "bias": official["bias"]})


def _code(arguments: OfficialArguments, name: str, hidden_size: int) -> tuple[int, int]:
    memory = OfficialArguments(arguments[name])
    _require(memory, _FIXED_IN_MEMORY)
    memory.leave(*_WITHOUT_EFFECT)
    sizes = ("hidden_size", "output_size", "value_size", "dense_size")
    memory.agree(**dict.fromkeys(sizes, hidden_size))
    code = memory["ffn_num_table"], memory["code_length"]
    memory.check(f"memoryformer ({name})")
    return code


def _convert_model(official: StateDict, arguments: OfficialArguments) -> Converted:
    embeddings = official["sequential.0.word_embeddings.weight"]
    vocab_size, hidden_size = embeddings.shape
    num_layers = arguments["num_layers"]
    arguments.agree(hidden_size=hidden_size, vocab_size=vocab_size)
    _require(arguments, _FIXED)
    num_tables, code_length = _code(arguments, "attn_memory_config", hidden_size)
    if (in_mlp := _code(arguments, "memory_config", hidden_size)) != (num_tables, code_length):
        raise ConversionError(
            "attn_memory_config and memory_config have different tables (ffn_num_table, code_length): "
            f"{(num_tables, code_length)} and {in_mlp}; the family supports only the same for both."
        )
    untied = arguments.get("no_weight_tying", True)
    state = OUR_NAMES.state_dict(official)
    if not untied and "lm_head.weight" in state:
        raise ConversionError("no_weight_tying is false, but the checkpoint has a separate head (final_linear).")
    family_config = MemoryFormerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=arguments["num_attention_heads"],
        max_position_embeddings=arguments.get("max_position_embeddings", 2048),
        code_length=code_length,
        num_tables=num_tables,
        extra_bits=official["sequential.2.mlp.0.tables"].shape[1] // num_tables - code_length,
        rms_norm_eps=arguments.get("rms_norm_epsilon", 1e-8),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(arguments.get("rotary_emb_base", 10000)),
            "partial_rotary_factor": arguments.get("rotary_pct", 1.0),
        },
        hidden_dropout=arguments.get("hidden_dropout", 0.0),
        attention_dropout=arguments.get("attention_dropout", 0.0),
        tie_word_embeddings=not untied,
    )
    return Converted(MemoryFormerForCausalLM, family_config, state)
