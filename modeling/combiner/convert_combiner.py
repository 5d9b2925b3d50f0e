"""The parameter tree of the official JAX code, flattened with `/`: one attention module, or the language model."""

import torch

from hf_attn.checkpoints.files import ConversionError
from hf_attn.checkpoints.official import Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_combiner import CombinerConfig, CombinerEncoderConfig
from .modeling_combiner import CombinerAttention, CombinerForCausalLM


#: official and paper's name of a plan -> its name here
KINDS = {
    "fixed": "fixed",
    "logn": "logsparse",
    "logsparse": "logsparse",
    "axial": "rowmajor",
    "rowmajor": "rowmajor",
    "axial_rowmajor": "rowmajor",
    "mixture": "mixture",
    "axial_mixture": "mixture",
    "axial_vertical": "vertical",
    "vertical": "vertical",
    "axial_horizontal": "horizontal",
    "horizontal": "horizontal",
}
#: the class of the attention module, which is part of the names of its parameters -> plan
MODULES = {
    "_SelfAttSqrtn_0": "fixed",
    "_SelfAttLogn_0": "logsparse",
    "_SelfAttAxialRowmajor_0": "rowmajor",
    "_AxialMixtureAtt_0": "mixture",
}
_LAYER = "autoreg_model/transformer_layer_"
_ATTENTION = (
    (r"\bquery/kernel$", "q_proj.weight"),
    (r"\bkey/kernel$", "k_proj.weight"),
    (r"\bvalue/kernel$", "v_proj.weight"),
)
_OUTPUT = ((r"\bDenseGeneral_0/kernel$", "o_proj.weight"),)
_ROW_KEYS = (
    (r"\bDenseGeneral_0/kernel$", "row_keys.output_proj.weight"),
    (r"\bDenseGeneral_1/kernel$", "row_keys.key_proj.weight"),
    (r"\bDenseGeneral_2/kernel$", "o_proj.weight"),
    (r"(^|_SelfAttAxialRowmajor_0/)LayerNorm_0/", r"\1row_keys.norm/"),
)
_MODEL = (
    (rf"/({'|'.join(MODULES)})/", ".self_attn."),
    (r"^Embed_0/embedding$", "model.embed_tokens.weight"),
    (r"^autoreg_model/LayerNorm_0/", "model.norm."),
    (r"^autoreg_model/Dense_0/", "lm_head."),
    (r"^autoreg_model/transformer_layer_", "model.layers."),
    (r"/LayerNorm_0/", ".input_layernorm."),
    (r"/LayerNorm_1/", ".post_attention_layernorm."),
    (r"/MlpBlock_0/Dense_0/", ".mlp.up_proj."),
    (r"/MlpBlock_0/Dense_1/", ".mlp.down_proj."),
    (r"[./](kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
_FROM_HEADS = ("o_proj.weight", "row_keys.output_proj.weight")


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert; see [`hf_attn.checkpoints.official.from_official`].

    Args:
        official: the parameter tree, flattened with `/`.
        config: `model` (or `kind`), `max_len` and `max_seg_len`, and where they cannot be read off the weights `causal`,
            `pool` and `own_segment_summary`; `level` is `"attention"` or `"lm"`. Sizes have to agree with the weights.
    """
    config.leave("dropout_rate", "attention_dropout_rate", "deterministic", "batch_size", "max_len")
    level = config.get("level", "lm" if "Embed_0/embedding" in official else "attention")
    if level == "lm":
        return _language_model(official, config)
    if level != "attention":
        raise ConversionError(f"level must be 'attention' or 'lm', got {level!r}.")
    causal = config.get("causal", True)
    family_config = (CombinerConfig if causal else CombinerEncoderConfig)(
        num_hidden_layers=1,
        vocab_size=2,
        bos_token_id=None,
        eos_token_id=None,
        **_attention_arguments(official, "", _kind(config), config),
    )
    state = _state_dict(official, family_config.combiner_kind)
    return Converted(CombinerAttention, {"config": family_config, "layer_idx": 0}, state)


def _kind(config: OfficialArguments, default: str | None = None) -> str:
    name = config.get("kind", config.get("model", default))
    if name not in KINDS:
        raise ConversionError(f"There is no plan {name!r}. Available: {', '.join(KINDS)}.")
    return KINDS[name]


def _attention_arguments(official: StateDict, prefix: str, kind: str, config: OfficialArguments) -> dict:
    hidden_size, heads, head_dim = official[f"{prefix}query/kernel"].shape
    config.agree(emb_dim=hidden_size, num_heads=heads, qkv_dim=heads * head_dim, head_dim=head_dim)
    max_len, segment_length = config["max_len"], config.get("max_seg_len")
    if kind != "logsparse" and segment_length is None:
        raise ConversionError(f"{kind} needs max_seg_len, the segment length in tokens.")
    return {
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "combiner_kind": kind,
        "combiner_segment_length": segment_length,
        "combiner_pool": config.get("pool", "max"),
        "own_segment_summary": config.get("own_segment_summary", False),
        "max_position_embeddings": max_len,
    }


def _state_dict(official: StateDict, kind: str) -> dict[str, torch.Tensor]:
    """Our names and shapes; Flax's kernels are (in, out), those of the attention with an axis for the heads."""
    rules = _ROW_KEYS if kind == "rowmajor" else _OUTPUT
    state = Renaming(*_ATTENTION, *rules, *_MODEL).state_dict(official)
    for name, tensor in state.items():
        if tensor.ndim == 3:
            tensor = tensor.flatten(0, 1) if name.endswith(_FROM_HEADS) else tensor.flatten(1)
        if tensor.ndim == 2 and name != "model.embed_tokens.weight":
            state[name] = tensor.T
    return state


def _language_model(official: StateDict, config: OfficialArguments) -> Converted:
    layers = {int(name.removeprefix(_LAYER).split("/")[0]) for name in official if name.startswith(_LAYER)}
    found = {part for name in official if (part := name.split("/")[-3 if name.count("/") >= 3 else 0]) in MODULES}
    if len(found) != 1:
        raise ConversionError(
            f"All layers must have the same kind of attention module, one of {', '.join(MODULES)}; found "
            f"{', '.join(sorted(found)) or 'none'}."
        )
    module = found.pop()
    kind = MODULES[module]
    if _kind(config, default=kind) != kind:
        raise ConversionError(f"The weights are those of {kind}, but the configuration says {_kind(config)}.")
    vocab_size = official["Embed_0/embedding"].shape[0]
    mlp_dim = official[f"{_LAYER}0/MlpBlock_0/Dense_0/kernel"].shape[1]
    config.agree(vocab_size=vocab_size, num_layers=len(layers), mlp_dim=mlp_dim, causal=True)
    family_config = CombinerConfig(
        vocab_size=vocab_size,
        num_hidden_layers=len(layers),
        intermediate_size=mlp_dim,
        bos_token_id=None,
        eos_token_id=None,
        **_attention_arguments(official, f"{_LAYER}0/{module}/", kind, config),
    )
    return Converted(CombinerForCausalLM, family_config, _state_dict(official, kind))
