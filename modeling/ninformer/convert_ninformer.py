"""Checkpoints of the official code, `ninformer.py` (its authors publish no weights)."""

from hf_attn.checkpoints.official import ConversionError, Converted, StateDict

from .configuration_ninformer import NiNformerConfig
from .modeling_ninformer import NiNformerForImageClassification


#: official name inside a block -> ours
_BLOCK = {
    "norm": "norm",
    "mgu.proj": "gating_unit.proj",
    "mgu.Mixer.token_mix.0": "gating_unit.mixer.token_norm",
    "mgu.Mixer.token_mix.2.net.0": "gating_unit.mixer.token_mlp.fc1",
    "mgu.Mixer.token_mix.2.net.3": "gating_unit.mixer.token_mlp.fc2",
    "mgu.Mixer.channel_mix.0": "gating_unit.mixer.channel_norm",
    "mgu.Mixer.channel_mix.1.net.0": "gating_unit.mixer.channel_mlp.fc1",
    "mgu.Mixer.channel_mix.1.net.3": "gating_unit.mixer.channel_mlp.fc2",
    "ffn.net.0": "mlp.fc1",
    "ffn.net.3": "mlp.fc2",
}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see :func:`hf_attn.checkpoints.official.from_official`.

    Args:
        official: official state dict.
        config: arguments of `NiNformerImageClassification`: `image_size`, `patch_size`, `in_channels`, `num_classes`,
            `d_model`, `d_ffn`, `seq_len`, `num_layers`, `dropout`.
    """
    family_config = NiNformerConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_channels=config["in_channels"],
        hidden_size=config["d_model"],
        intermediate_size=config["d_ffn"],
        num_hidden_layers=config["num_layers"],
        hidden_dropout_prob=config["dropout"],
        num_labels=config["num_classes"],
    )
    if config["seq_len"] != family_config.num_tokens:
        raise ConversionError(
            f"seq_len={config['seq_len']} does not fit image_size={config['image_size']} and patch_size="
            f"{config['patch_size']}, which make {family_config.num_tokens} tokens."
        )
    modules = {"patcher": "ninformer.patch_embeddings.projection", "classifier": "classifier"}
    for index in range(family_config.num_hidden_layers):
        modules |= {f"model.{index}.{name}": f"ninformer.layers.{index}.{ours}" for name, ours in _BLOCK.items()}
    state = {
        f"{ours}.{kind}": official[f"{name}.{kind}"] for name, ours in modules.items() for kind in ("weight", "bias")
    }
    return Converted(NiNformerForImageClassification, family_config, state)
