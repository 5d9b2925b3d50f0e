"""Checkpoints of the official code, `activator.py` and `activator_only_GEGLU.py` (its authors publish no weights)."""

from hf_attn.checkpoints.official import Converted, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_activator import ActivatorConfig
from .modeling_activator import ActivatorForImageClassification


_NAMES = Renaming(
    (r"^patcher\.", "activator.patch_embeddings.projection."),
    (r"^classifier\.", "classifier."),
    (r"^model\.(\d+)\.", r"activator.layers.\1."),
    (r"\.actgu\.", ".gating_unit."),
    (r"\.ffn\.net\.0\.", ".mlp.fc1."),
    (r"\.ffn\.net\.3\.", ".mlp.fc2."),
)


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: official state dict of either class; its keys tell whether the blocks have an MLP.
        config: arguments of `ACTIVATORImageClassification`: `image_size`, `patch_size`, `in_channels`, `num_classes`,
            `d_model`, `d_ffn`, `num_layers`, `dropout`.
    """
    family_config = ActivatorConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_channels=config["in_channels"],
        hidden_size=config["d_model"],
        intermediate_size=config["d_ffn"],
        num_hidden_layers=config["num_layers"],
        hidden_dropout_prob=config["dropout"],
        use_mlp="model.0.ffn.net.0.weight" in official,
        num_labels=config["num_classes"],
    )
    return Converted(ActivatorForImageClassification, family_config, _NAMES.state_dict(official))
