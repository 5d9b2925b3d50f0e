"""Checkpoints of the official code, `activator.py` and `activator_only_GEGLU.py` (its authors publish no weights)."""

from hf_attn.checkpoints.official import Converted, StateDict

from .configuration_activator import ActivatorConfig
from .modeling_activator import ActivatorForImageClassification


#: official name inside a block -> ours
_BLOCK = {
    "norm": "norm",
    "actgu.norm": "gating_unit.norm",
    "actgu.proj_1": "gating_unit.proj_1",
    "actgu.proj_2": "gating_unit.proj_2",
    "actgu.proj_3": "gating_unit.proj_3",
}
_MLP = {"ffn.net.0": "mlp.fc1", "ffn.net.3": "mlp.fc2"}


def convert_official(official: StateDict, config: dict) -> Converted:
    """Convert; see :func:`hf_attn.checkpoints.official.from_official`.

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
    block = _BLOCK | _MLP if family_config.use_mlp else _BLOCK
    modules = {"patcher": "activator.patch_embeddings.projection", "classifier": "classifier"}
    for index in range(family_config.num_hidden_layers):
        modules |= {f"model.{index}.{name}": f"activator.layers.{index}.{ours}" for name, ours in block.items()}
    state = {
        f"{ours}.{kind}": official[f"{name}.{kind}"] for name, ours in modules.items() for kind in ("weight", "bias")
    }
    return Converted(ActivatorForImageClassification, family_config, state)
