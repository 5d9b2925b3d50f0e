"""Weights of the layers behind the encoders under the names of the equations; the authors have published none."""

from hf_attn.checkpoints.official import ConversionError, Converted, OfficialArguments, StateDict
from hf_attn.checkpoints.renaming import Renaming

from .configuration_dementia_fusion import CHOICES, DementiaFusionConfig
from .layers import ATTENTIONS, FusionHead


_NAMES = Renaming(
    (r"(^|_attention\.)((context_)?(query|key)|value)\.", r"\1\2_proj."),
    (r"(^|_attention\.)gate_(query|key)_(hidden|context)\.", r"\1\2_gate.\3."),
    (r"(^|_attention\.)gate_q\.", r"\1gate.query."),
    (r"(^|_attention\.)gate_k\.", r"\1gate.key."),
    (r"(^|_attention\.)gate_out\.", r"\1gate.out."),
    (r"^(text|image)_attention\.", r"interaction.\1_attention."),
    (r"^classifier\.", "classifier.classifier."),
    (r"^fusion\.", "classifier.fusion."),
)
_GATES = {"agsa": "channel", "channel": "channel", "muan": "scalar", "scalar": "scalar"}


def convert_official(official: StateDict, config: OfficialArguments) -> Converted:
    """Convert the whole head (`text_attention.`, `image_attention.`, `fusion.`, `classifier.`), or one attention layer.

    Args:
        official: the weights.
        config: `num_heads` and, if they differ from the defaults, `context`, `cross`, `ot_reg`, `ot_iters`, `label_smoothing`;
            what follows from the weights need not be given.

    Returns:
        A [`~hf_attn.modeling.dementia_fusion.layers.FusionHead`], or the attention layer. `text_config` and `vision_config` of
        their configuration say no more than widths and numbers of layers.
    """
    whole = any(name.startswith("text_attention.") for name in official)
    prefix = "text_attention." if whole else ""
    fields = _attention_fields(official, config, prefix)
    state = _NAMES.state_dict(official)
    if not whole:
        config.leave("head_dim", "kind")
        return Converted(ATTENTIONS[fields["intra"]], {"config": _config(fields), "modality": "text"}, state)

    layers = {
        "text": fields["layers"],
        "vision": _attention_fields(official, config, "image_attention.")["layers"],
    }
    fields |= _head_fields(official, config, fields["hidden_size"])
    return Converted(FusionHead, {"config": _config(fields, layers)}, state)


def _attention_fields(official: StateDict, config: OfficialArguments, prefix: str) -> dict:
    hidden_size = official[f"{prefix}query.weight"].shape[1]
    config.agree(hidden_size=hidden_size)
    num_heads = config["num_heads"]
    fields = {"hidden_size": hidden_size, "num_attention_heads": num_heads, "layers": 0}
    if f"{prefix}gate_out.weight" in official:
        fields["intra"] = "gate"
        # A head of one channel has the same gates either way.
        fields["gate"] = "scalar" if official[f"{prefix}gate_out.weight"].shape[0] == 2 else "channel"
        gate = config.get("gate", fields["gate"])
        if _GATES.get(gate, gate) != fields["gate"]:
            raise ConversionError(
                f"The weights are those of gate={fields['gate']}, but the configuration says {gate}."
            )
        config.leave("context", "num_states", "variant")
    else:
        fields["intra"] = "context"
        states = official[f"{prefix}context_query.weight"].shape[1] // hidden_size
        context = str(config.get("context", "global")).replace("_", "-")
        if context not in CHOICES["context"]:
            raise ConversionError(f"context must be one of {', '.join(CHOICES['context'])}, got {context!r}.")
        fields["context"] = context
        if context == "global":
            config.leave("num_states")
        else:
            fields["layers"] = states if context == "deep" else states - 1
            if not prefix:
                config.agree(num_states=fields["layers"] + 1)
        config.leave("gate")
    intra = config.get("intra", fields["intra"])
    if str(intra).partition("-")[0].partition("_")[0] != fields["intra"]:
        raise ConversionError(f"The weights are those of intra={fields['intra']}, but the configuration says {intra}.")
    return fields


def _head_fields(official: StateDict, config: OfficialArguments, hidden_size: int) -> dict:
    fields = {"num_labels": official["classifier.weight"].shape[0]}
    config.agree(num_labels=fields["num_labels"])
    fields["fusion"] = "attention" if "fusion.score.weight" in official else "concat"
    config.agree(fusion=fields["fusion"])
    cross = config.get("cross", "sinkhorn")
    if fields["fusion"] == "concat" and official["fusion.proj.weight"].shape[1] == 2 * hidden_size:
        cross = config.get("cross", "none")
    fields["cross"] = "none" if cross is None else cross
    config.leave("num_states")
    return fields | {name: config[name] for name in ("ot_reg", "ot_iters", "label_smoothing") if name in config}


def _config(fields: dict, layers: dict[str, int] | None = None) -> DementiaFusionConfig:
    layers = layers or {"text": fields["layers"], "vision": fields["layers"]}
    fields = {name: value for name, value in fields.items() if name != "layers"}
    width = fields.pop("hidden_size")
    encoder = {"hidden_size": width, "num_attention_heads": fields["num_attention_heads"], "intermediate_size": width}
    own_config = DementiaFusionConfig(
        text_config={"model_type": "bert", "num_hidden_layers": layers["text"], **encoder},
        vision_config={"model_type": "deit", "num_hidden_layers": layers["vision"], **encoder},
        classifier_dropout=0.0,
        **fields,
    )
    own_config._attn_implementation = "sdpa"
    return own_config
