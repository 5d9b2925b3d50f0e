"""Checkpoints in the layout of a Qwen2 in which some layers have another mixer.

There is no official checkpoint; this is the layout of the weights of the paper's models as one would publish them.
"""

from hf_attn.checkpoints.official import Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import KEEP, Renaming

from .configuration_deconstructing_attention import DeconstructedConfig
from .modeling_deconstructing_attention import DeconstructedForCausalLM


_NAMES = Renaming((r"^model\.static_(embeds|ids)$", r"model.static_input.\1"), KEEP)


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: Qwen2 key names; `self_attn.{gate,up,down}_proj` in layers of kind `mlp`; `model.static_embeds` and
            `model.static_ids` for the constant sequences.
        config: `num_heads`, `layer_kinds`, and optionally `num_kv_heads`, `head_dim`, `rope_theta`, `rms_norm_eps`, `static_std`,
            `static_norm` and `taylor_form` (`joint` or `per_order`, of layers of kind `approximate`). `vocab_size`,
            `hidden_size`, `intermediate_size` and `max_len` follow from the weights.
    """
    state = _NAMES.state_dict(official)
    embeddings = official["model.embed_tokens.weight"]
    lengths = {tensor.shape[0] for name, tensor in state.items() if name.startswith("model.static_input.")}
    sizes = {
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "intermediate_size": official["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    config.agree(**sizes, num_layers=len(config["layer_kinds"]))
    if lengths:
        (length,) = lengths
        config.agree(max_len=length)
    else:
        length = config.get("max_len", 2048)
    form = {"joint": "taylor_joint", "per_order": "taylor_per_order"}[config.get("taylor_form", "joint")]
    kinds = [form if kind == "approximate" else kind for kind in config["layer_kinds"]]
    family_config = DeconstructedConfig(
        **sizes,
        num_hidden_layers=len(kinds),
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config.get("num_kv_heads") or config["num_heads"],
        head_dim=config.get("head_dim"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        attention_bias=any(name.endswith(("self_attn.v_proj.bias", "self_attn.gate_proj.bias")) for name in state),
        qk_norm=any(name.endswith("self_attn.q_norm.weight") for name in state),
        layer_kinds=kinds,
        max_position_embeddings=length,
        static_length=length,
        static_std=config.get("static_std", 0.02),
        static_norm=config.get("static_norm", True),
        tie_word_embeddings="lm_head.weight" not in state,
    )
    return Converted(DeconstructedForCausalLM, family_config, state)
