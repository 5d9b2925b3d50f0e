"""A tiny official checkpoint: EchoAtt, whose official names are ours."""

import torch

from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM


#: official constructor arguments
ARGUMENTS = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "shared_layers": [1],
}


def official_state_dict() -> dict[str, torch.Tensor]:
    """An official state dict with random weights that belongs to [`ARGUMENTS`]."""
    config = EchoAttConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        shared_layers=[1],
    )
    return {name: tensor.clone() for name, tensor in EchoAttForCausalLM(config).state_dict().items()}
