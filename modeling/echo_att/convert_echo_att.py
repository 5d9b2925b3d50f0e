"""Checkpoints in the layout of a Llama whose shared layers lack their query and key projections.

There is no official checkpoint; this is the layout of the weights of the paper's models as one would publish them.
"""

from hf_attn.checkpoints.official import Converted, StateDict
from hf_attn.checkpoints.renaming import KEEP, Renaming

from .configuration_echo_att import EchoAttConfig
from .modeling_echo_att import EchoAttForCausalLM


#: Llama's names; `teacher_only.` holds weights of the teacher that the student has dropped
_NAMES = Renaming((r"^teacher_only\.", None), KEEP)


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: Llama key names, with or without a `model.` prefix of the head-less part as transformers writes them.
        config: `vocab_size`, `hidden_size`, `intermediate_size`, `num_layers`, `num_heads`, `num_kv_heads`,
            `rope_theta`, `rms_norm_eps`, `shared_layers` and optionally `shared_source`.
    """
    state = _NAMES.state_dict(official)
    family_config = EchoAttConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config["num_kv_heads"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        shared_layers=config["shared_layers"],
        shared_source=config.get("shared_source"),
        tie_word_embeddings="lm_head.weight" not in state,
    )
    return Converted(EchoAttForCausalLM, family_config, state, _NAMES.dropped(official))
