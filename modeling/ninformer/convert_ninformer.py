"""Checkpoints of the official code, `ninformer.py` (its authors publish no weights)."""

from hf_attn.checkpoints.official import ConversionError, Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_ninformer import NiNformerConfig
from .modeling_ninformer import NiNformerForImageClassification


_NAMES = Renaming(
    (r"^patcher\.", "ninformer.patch_embeddings.projection."),
    (r"^classifier\.", "classifier."),
    (r"^model\.(\d+)\.", r"ninformer.layers.\1."),
    (r"\.mgu\.", ".gating_unit."),
    (r"\.Mixer\.(token|channel)_mix\.0\.", r".mixer.\1_norm."),
    (r"\.Mixer\.(token|channel)_mix\.[12]\.net\.", r".mixer.\1_mlp.net."),
    (r"\.ffn\.net\.", ".mlp.net."),
    (r"mlp\.net\.0\.", "mlp.fc1."),
    (r"mlp\.net\.3\.", "mlp.fc2."),
)


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

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
            f"{config['patch_size']}, which result in {family_config.num_tokens} tokens."
        )
    return Converted(NiNformerForImageClassification, family_config, _NAMES.state_dict(official))
