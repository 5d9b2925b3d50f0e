"""Official checkpoints of OAT (HKUST-NISL/oat_eccv24)."""

from pathlib import Path
from typing import Any

import torch

from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming, split_fused

from .configuration_oat import SINUSOIDS, OATConfig
from .modeling_oat import OATForScanpathPrediction
from .position_table import position_table


_SIDES = {"encoder": "transformer_encoder", "decoder": "transformer_decoder"}
_NAMES = (
    (r"^model\.", ""),
    # A linear layer that no forward pass calls, and a sinusoid that is recomputed.
    (r"^(LinearEmbedding|onedpositional_encoding)\.", None),
    (r"^cnn_embedding\.cnn([12])\.0\.", r"oat.encoder.object_encoder.conv\1."),
    (r"^cnn_embedding\.fc\.", "oat.encoder.object_encoder.projection."),
    (r"^transformer_(encoder|decoder)\.", r"oat.\1."),
    (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.decoder\.layers\.(\d+)\.norm2\.", r".decoder.layers.\1.encoder_attn_layer_norm."),
    (r"\.norm[23]\.", ".final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
)
_LINEAR_HEAD = ((r"^generator\.", "head."),)
_POINTER_HEAD = (
    (r"^generator\.", None),
    (r"^cross_attentions\.(\d+)\.decode_fc\.", r"head.\1.query_proj."),
    (r"^cross_attentions\.(\d+)\.encode_fc\.", r"head.\1.key_proj."),
)
#: classes of a published dataset -> its grid
_GRIDS = {86: (6, 14), 29: (3, 9), 24: (2, 11)}
#: inputs of the projection after the pooling -> levels of the pyramid
_PYRAMIDS = {160: 2, 672: 3, 2720: 4}


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: state dict of a Lightning checkpoint, keys with or without `model.`.
        config: official arguments. `PE_path`, the `.npy` file with the position table, or the table itself as `pe_table`, is
            needed for `functionChoice="learned"` (the default), because the checkpoint does not hold it. `rows` and `cols` are
            needed for a grid that is not one of the published ones. The published values are taken for `nhead` (4), `CA_dk` (512),
            `crop_height` (150), `crop_width` (93), `pe_sigma` (2), `alpha` (1) and `max_len` (54) unless they are given; sizes are
            read off the weights.
    """
    prefix = "model." if any(key.startswith("model.") for key in official) else ""
    weights = _Weights(official, prefix)
    fields = _fields(weights, config)
    own_config = OATConfig(**fields)
    num_heads = own_config.num_pointer_heads
    if own_config.scanpath_head == "linear":
        names = Renaming(*_NAMES, *_LINEAR_HEAD)
    else:
        names = Renaming(*_NAMES, *_POINTER_HEAD, (r"^readout\.", "head.readout." if num_heads > 1 else None))
    state = split_fused(names.state_dict(official), "in_proj")
    if own_config.scanpath_head == "pointer":
        for name in ("query_proj.weight", "query_proj.bias", "key_proj.weight", "key_proj.bias"):
            state[f"head.{name}"] = torch.cat([state.pop(f"head.{head}.{name}") for head in range(num_heads)])
    state["oat.encoder.position_code.table"] = _table(config, own_config)
    return Converted(OATForScanpathPrediction, own_config, state, names.dropped(official))


class _Weights:
    """The official weights without the prefix of their names."""

    def __init__(self, official: StateDict, prefix: str):
        self._official, self._prefix = official, prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._official[self._prefix + key]

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._official

    def count(self, pattern: str) -> int:
        """How many of the keys `pattern.format(0)`, `pattern.format(1)`... there are."""
        number = 0
        while pattern.format(number) in self:
            number += 1
        return number


def _fields(weights: _Weights, config: OfficialArguments) -> dict[str, Any]:
    version = config.get("CA_version", 3 if weights.count("cross_attentions.{}.encode_fc.weight") else 0)
    if version not in (0, 3):
        raise ConversionError(
            f"CA_version must be 0 (linear) or 3 (object attention), as in the official code, got {version!r}."
        )
    fields = {
        f"{side}_layers": weights.count(f"{official}.layers.{{}}.linear1.weight") for side, official in _SIDES.items()
    }
    intermediate_size, hidden_size = weights["transformer_encoder.layers.0.linear1.weight"].shape
    fields |= {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    features = weights["cnn_embedding.fc.weight"].shape[1]
    fields["pyramid_levels"] = config.get("spp", _PYRAMIDS.get(features, 0))
    if version == 3:
        fields["num_pointer_heads"] = weights.count("cross_attentions.{}.encode_fc.weight")
    config.agree(
        num_encoder_layers=fields["encoder_layers"],
        num_decoder_layers=fields["decoder_layers"],
        emb_size=hidden_size,
        dim_feedforward=intermediate_size,
    )
    if version == 3:
        config.agree(CA_head=fields["num_pointer_heads"])
    # Dropout, sizes of unused layers, and, without object attention, its settings.
    config.leave("dropout", "tgt_vocab_size", "input_dimension", "CA_head")
    fields["num_rows"], fields["num_columns"] = _grid(weights, config)
    defaults = {
        "nhead": 4,
        "CA_dk": 512,
        "crop_height": 150,
        "crop_width": 93,
        "pe_sigma": 2.0,
        "alpha": 1.0,
        "max_len": 54,
    }
    names = {
        "nhead": "num_attention_heads",
        "CA_dk": "pointer_scaling_dim",
        "crop_height": "crop_height",
        "crop_width": "crop_width",
        "pe_sigma": "position_sigma",
        "alpha": "position_alpha",
        "max_len": "max_scanpath_length",
    }
    fields |= {names[official]: config.get(official, default) for official, default in defaults.items()}
    if config.get("max_len") is None:
        fields["max_scanpath_length"] = defaults["max_len"]
    config.leave("pe_table", "PE_path")
    function = config.get("functionChoice", "learned")
    if function != "learned" and function not in SINUSOIDS:
        raise ConversionError(
            f"functionChoice={function!r} is not supported; available: learned, {', '.join(SINUSOIDS)}."
        )
    if str(config.get("changeX")) in ("True", "False"):
        raise ConversionError("changeX, which moves rows or columns by fractions, is not supported.")
    fields["position_encoding"] = "gaussian" if function == "learned" else function
    if function == "learned":
        fields["num_positions"] = len(_given_table(config))
    fields["scanpath_head"] = "pointer" if version == 3 else "linear"
    return fields


def _grid(weights: _Weights, config: OfficialArguments) -> tuple[int, int]:
    if "rows" in config and "cols" in config:
        return config["rows"], config["cols"]
    classes = weights["generator.weight"].shape[0] if "generator.weight" in weights else None
    if classes not in _GRIDS:
        raise ConversionError("The weights do not determine the grid: pass `rows` and `cols` in the configuration.")
    return _GRIDS[classes]


def _given_table(config: OfficialArguments) -> torch.Tensor:
    """The position table that is passed together with the checkpoint."""
    table = config.get("pe_table")
    if table is None and config.get("PE_path") is None:
        raise ConversionError(
            "Official checkpoints do not contain the position table. Pass the file that was used in training as "
            "`PE_path`, for example amazon_learned_random_PE.npy of the official repository, or the table itself as "
            "`pe_table`."
        )
    if table is None:
        path = Path(config["PE_path"])
        if not path.is_file():
            raise ConversionError(f"There is no position table {path} (`PE_path`).")
        import numpy as np

        try:
            table = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ConversionError(f"{path} is not an .npy file of numbers: {error}") from error
    table = torch.as_tensor(table)
    if table.ndim != 2 or not table.is_floating_point():
        raise ConversionError(
            f"The position table must be a numeric array of shape (positions, width), got {list(table.shape)} "
            f"{table.dtype}."
        )
    return table.float()


def _table(config: OfficialArguments, own_config: OATConfig) -> torch.Tensor:
    if own_config.position_encoding != "gaussian":
        return position_table(own_config)
    table = _given_table(config)
    if table.shape != own_config.position_table_shape:
        raise ConversionError(
            f"The position table has the shape {list(table.shape)}, but tokens of {own_config.hidden_size} channels "
            f"and a grid of {own_config.num_rows} x {own_config.num_columns} need "
            f"{list(own_config.position_table_shape)}."
        )
    return table
