"""Official layout: one attention module, or the decoder around it that this package defines (no checkpoint is published)."""

from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import KEEP, Renaming

from .configuration_complexformer import ComplexFormerConfig
from .modeling_complexformer import ComplexFormerAttention, ComplexFormerForCausalLM


#: `g` is a table of frequencies, which follows from the head's width
OUR_NAMES = Renaming((r"(^|\.)g$", None), (r"\bW_([qkvo])\.", r"\1_proj."), KEEP)


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of the official attention module, or of a decoder with such modules.
        config: `level`, `"attention"` or `"lm"` (guessed from the keys); `frequency_rounding` and `score_scale`; of a module
            `d_model` and `num_heads`, of a decoder the names of [`ComplexFormerConfig`].
    """
    dropped, state = OUR_NAMES.dropped(official), OUR_NAMES.state_dict(official)
    level = config.get("level", "attention" if "W_q.weight" in official else "lm")
    shared = {
        "frequency_rounding": config.get("frequency_rounding"),
        "score_scale": config.get("score_scale", 1.0),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
    }
    config.leave("dropout", "attention_dropout")
    if level == "attention":
        width = official["W_q.weight"].shape[0]
        heads = official["delta_params"].shape[0]
        config.agree(d_model=width, num_heads=heads)
        family_config = ComplexFormerConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=1,
            bos_token_id=None,
            eos_token_id=None,
            **shared,
        )
        return Converted(ComplexFormerAttention, {"config": family_config, "layer_idx": 0}, state, dropped)
    if level != "lm":
        raise ConversionError(f"level must be 'attention' or 'lm', got {level!r}.")
    vocab_size, hidden_size = official["model.embed_tokens.weight"].shape
    layers = {int(name.split(".")[2]) for name in official if name.startswith("model.layers.")}
    config.agree(vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=len(layers))
    heads = official["model.layers.0.self_attn.bias_params"].shape[0]
    kv_heads = official["model.layers.0.self_attn.delta_params"].shape[0]
    intermediate_size = official["model.layers.0.mlp.gate_proj.weight"].shape[0]
    config.agree(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=intermediate_size)
    tied = "lm_head.weight" not in official
    config.agree(tie_word_embeddings=tied)
    family_config = ComplexFormerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=official["model.layers.0.self_attn.W_q.weight"].shape[0] // heads,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
        pad_token_id=None,
        **shared,
    )
    return Converted(ComplexFormerForCausalLM, family_config, state, dropped)
